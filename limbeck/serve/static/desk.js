// One row of the desk: how long it was looked at, and drafts that are never lost.
import { post, tell } from "./studio.js";

const IDLE = 120_000; // milliseconds without a sign of life, after which nobody is taken to be reading
const key = `desk${location.pathname}`;

// Time counts while the page is in sight and somebody is there; editing and rejecting are pages of the same row.
let spent = Number(sessionStorage.getItem(key) ?? 0);
let looked = performance.now(), lived = performance.now();
for (const sign of ["keydown", "pointerdown", "pointermove", "wheel", "scroll"]) addEventListener(sign, () => { lived = performance.now(); }, { passive: true });
function count() {
  const now = performance.now();
  if (!document.hidden && now - lived < IDLE) spent += now - looked;
  looked = now;
  sessionStorage.setItem(key, spent);
  return spent / 1000;
}
setInterval(count, 1000);
document.addEventListener("visibilitychange", count);
for (const form of document.forms) form.addEventListener("submit", () => {
  const field = form.elements.namedItem("seconds");
  if (!field) return;
  field.value = count().toFixed(1);
  sessionStorage.removeItem(key);
  spent = 0;
});

const form = document.querySelector("[data-draft]");
if (form) keep(form);

/** Save what is typed a moment later, one request at a time, and again until it is saved. */
function keep(form) {
  const text = form.elements.namedItem("completion"), reason = form.elements.namedItem("reason");
  const sign = form.querySelector(".keeping"), change = document.getElementById("change");
  let stale = false, busy = false, timer = 0, sending = false;
  const why = () => [...form.querySelectorAll("[name=why]:checked")].map((one) => one.value);
  const body = () => JSON.stringify({ id: form.dataset.id, text: text?.value, reason: reason ? [...why(), reason.value].filter(Boolean).join("; ") : undefined });
  const send = (more) => fetch(form.dataset.draft, { method: "POST", headers: { "content-type": "application/json" }, body: body(), ...more });

  async function save() {
    if (busy || !stale || sending) return;
    busy = true;
    stale = false;
    sign.textContent = sign.dataset.saving;
    let wait = 0;
    try {
      const answer = await send();
      if (!answer.ok) throw new Error(answer.statusText);
      const html = await answer.text(); // sanitised by the server: templates escape all of it
      if (change) change.replaceChildren(document.createRange().createContextualFragment(html));
      sign.textContent = sign.dataset.saved;
    } catch {
      stale = true;
      wait = 2000;
      sign.textContent = sign.dataset.unsaved;
    }
    busy = false;
    if (stale) timer = setTimeout(save, wait);
  }
  function changed() {
    stale = true;
    clearTimeout(timer);
    timer = setTimeout(save, 250);
  }
  form.addEventListener("input", changed);
  form.addEventListener("submit", () => { sending = true; clearTimeout(timer); });
  addEventListener("pagehide", () => { if (stale && !sending) send({ keepalive: body().length < 60_000 }).catch(() => {}); });
  addEventListener("beforeunload", (event) => { if (stale && !sending && sign.textContent === sign.dataset.unsaved) event.preventDefault(); });

  for (const button of form.querySelectorAll("[data-help]")) button.addEventListener("click", async () => {
    const shown = button.firstChild.textContent;
    button.disabled = true;
    if (button.dataset.busy) button.firstChild.textContent = `${button.dataset.busy} `;
    try {
      const said = await post(button.dataset.help, { text: text.value, model: form.elements.namedItem("model")?.value ?? "" });
      if (said.text === text.value.trim()) tell(button.dataset.none ?? "");
      else put(said.text);
    } catch (error) {
      tell(error.message);
    }
    button.firstChild.textContent = shown;
    button.disabled = false;
  });
  /** A new text that Ctrl-Z takes back. */
  function put(whole) {
    text.focus();
    text.select();
    if (!document.execCommand("insertText", false, whole)) text.value = whole;
    text.blur();
    changed();
  }
  text?.addEventListener("keydown", (event) => {
    if (event.key === "Escape") text.blur();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.querySelector("[data-save]").click();
  });
}
