// Chat: the page follows what the server says. It keeps nothing of its own but the draft of the next message.
import { events, tell } from "./studio.js";

const KEPT = 24000; // characters of finished blocks that stay in the page while a text grows; the rest can be paged
const SETTINGS = ["model", "beside", "temperature", "budget", "top_p", "max_tokens", "system"]; // fields of the composer that every question goes with
const REST = 5000; // milliseconds between two looks at whether another window has changed the conversation

const talk = document.querySelector(".talk[data-talk]");
const composer = document.querySelector(".composer");
const here = talk && `/chat/${talk.dataset.talk}`;
const draft = `draft ${here ?? "new"}`;
let version = Number(turns()?.dataset.version);
let following = new AbortController();

function turns() { return talk?.querySelector(".turns"); }
function running() { return [...talk.querySelectorAll(".answer[data-state='running']")]; }
function answer(number) { return talk.querySelector(`[data-answer="${number}"]`); }

/** What a form asks for; the HTML that comes back. The server's own sentence is told when it refuses. */
async function ask(url, body) {
  const said = await fetch(url, { method: body ? "POST" : "GET", body, headers: { "hx-request": "true" } });
  if (said.ok) return new DOMParser().parseFromString(await said.text(), "text/html"); // runs nothing
  const why = await said.json().catch(() => ({}));
  throw new Error(typeof why.detail === "string" ? why.detail : why.error?.message ?? said.statusText);
}

/** Put the turns that came in the place of all from `first` on (none: behind them all). */
function place(page, first) {
  const came = page.querySelector(".turns");
  for (const one of came.querySelectorAll(".answer")) keepOpen(answer(one.dataset.answer), one);
  for (let old = first, next; old; old = next) { next = old.nextElementSibling; old.remove(); }
  turns().append(...came.children);
  version = Number(came.dataset.version);
  settle();
}

/** After every change: which keys go where, after which turn the next message is asked, and whether somebody is answering. */
function settle() {
  const last = turns().lastElementChild;
  for (const one of talk.querySelectorAll("[data-key][data-lastkey]")) one.removeAttribute("data-key");
  for (const key of ["t", "c", "r", "e"]) last?.querySelector(`[data-lastkey="${key}"]`)?.setAttribute("data-key", key);
  if (composer?.elements.parent && last) composer.elements.parent.value = last.dataset.turn;
  talk.classList.toggle("busy", running().length > 0);
  window.htmx?.process(turns());
}

/** A thought that somebody opened or closed stays so. */
function keepOpen(old, fresh) {
  const was = old?.querySelector(".thought"), is = fresh.querySelector(".thought");
  if (!was?.dataset.touched) return;
  is.open = was.open;
  is.dataset.touched = "yes";
}

/** For those who listen: eyes see it happen. */
function murmur(text) { talk.querySelector(".murmur").textContent = text; }

function atEnd() { return window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 120; }
function toEnd() { window.scrollTo(0, document.documentElement.scrollHeight); }

// ------------------------------------------------------------ following

const waiting = new Map(); // growth that came since the last frame

function take(event) {
  const one = answer(event.answer);
  if (!one) return refresh();
  if (!waiting.size) requestAnimationFrame(paint);
  const had = waiting.get(event.answer) ?? { parts: [] };
  had.parts.push(...Object.entries(event.parts));
  had.meter = event.meter;
  waiting.set(event.answer, had);
}

/** One frame: everything that came since the last one, in one go. */
function paint() {
  const follow = atEnd();
  for (const [number, { parts, meter }] of waiting) {
    const one = answer(number);
    if (!one || one.dataset.state !== "running") continue;
    for (const [name, growth] of parts) grow(one, one.querySelector(`[data-part="${name}"]`), growth);
    one.querySelector(".phase").textContent = meter.phase;
    one.querySelector(".thought .took").textContent = meter.thought;
    const thought = one.querySelector(".thought");
    if (one.querySelector(".spoken .tail, .spoken .blocks").textContent && thought.open && !thought.dataset.touched) thought.open = false;
  }
  waiting.clear();
  if (follow) toEnd();
}

function grow(one, flow, growth) {
  const blocks = flow.querySelector(".blocks"), tail = flow.querySelector(".tail");
  const bottom = flow.scrollTop + flow.clientHeight > flow.scrollHeight - 40;
  if (growth.fresh) { blocks.replaceChildren(); tail.textContent = ""; flow.querySelector(".folded").hidden = !growth.folded; }
  if (growth.html) {
    blocks.insertAdjacentHTML("beforeend", growth.html); // sanitised by the server
    if (trim(blocks)) flow.querySelector(".folded").hidden = false;
  }
  if (growth.at === 0) tail.textContent = growth.tail;
  else tail.append((tail.dataset.cut ?? "") + growth.tail);
  if (flow.dataset.part === "answer") hideTags(tail);
  if (tail.childNodes.length > 50) tail.normalize();
  if (flow.dataset.part === "thought") one.querySelector(".thought").hidden = false;
  if (bottom) flow.scrollTop = flow.scrollHeight;
}

/** The tags around a final answer are not shown; once its block is finished, the server marks the answer. */
function hideTags(tail) {
  const text = tail.textContent;
  const cut = text.match(/<\/?(?:a(?:n(?:s(?:w(?:er?)?)?)?)?)?$/)?.[0] ?? ""; // the beginning of a tag, perhaps
  tail.dataset.cut = cut;
  if (text.includes("<")) tail.replaceChildren(text.slice(0, text.length - cut.length).replace(/<\/?answer>/g, ""));
}

/** Take away the first blocks of too long a text; whether there were any. */
function trim(blocks) {
  let kept = 0, first = blocks.lastElementChild;
  while (first?.previousElementSibling && kept < KEPT) { kept += first.textContent.length; first = first.previousElementSibling; }
  const long = first !== blocks.firstElementChild;
  while (blocks.firstElementChild !== first) blocks.firstElementChild.remove();
  return long;
}

/** An answer has ended: the server's own picture of it takes the place of what grew here. */
async function end(event) {
  const old = answer(event.answer);
  const page = await ask(`${here}/answers/${event.answer}`);
  const follow = atEnd();
  const fresh = page.querySelector(".answer");
  keepOpen(old, fresh);
  old?.replaceWith(fresh);
  if (event.version === version + 1) version = event.version; // nothing else has happened since
  settle();
  if (follow) toEnd();
  murmur(talk.dataset.saidDone);
}

/** The conversation is another than this page shows. Nothing is taken from under somebody who is editing. */
async function refresh() {
  if (talk.querySelector(".edit[open]")) return;
  const page = await ask(here);
  place(page, turns().firstElementChild);
}

async function follow() {
  for (;;) {
    following = new AbortController();
    try {
      const stream = await fetch(`${here}/follow?after=${version}`, { signal: following.signal });
      if (!stream.ok) throw new Error(stream.statusText);
      for await (const event of events(stream)) {
        if (event.changed) await refresh();
        else if (event.ended) await end(event);
        else take(event);
      }
      if (running().length) await refresh();
    } catch (error) {
      if (error.name !== "AbortError" && !document.hidden) tell(talk.dataset.saidLost);
    }
    await pause(running().length ? 1000 : REST);
  }
}

let wake = () => {};
/** Wait; not at all if something is begun meanwhile, and for ever while nobody looks. */
function pause(milliseconds) {
  return new Promise((done) => {
    wake = done;
    setTimeout(() => { if (!document.hidden) done(); }, milliseconds);
  });
}

document.addEventListener("visibilitychange", () => { if (document.hidden) following.abort(); else wake(); });

// ------------------------------------------------------------ what people do

async function act(form, button) {
  const body = new FormData(form, button);
  for (const name of SETTINGS) if (composer && !body.has(name)) body.set(name, composer.elements[name].value);
  place(await ask(button?.hasAttribute("formaction") ? button.formAction : form.action, body), form.closest(".turn"));
  if (running().length) toEnd();
  wake();
}

async function speak() {
  const text = composer.elements.text;
  if (!text.value.trim() || talk.classList.contains("busy")) return;
  talk.classList.add("busy");
  try { place(await ask(composer.action, new FormData(composer)), null); } finally { settle(); }
  text.value = "";
  sessionStorage.removeItem(draft);
  murmur(talk.dataset.saidBegun);
  toEnd();
  wake();
}

async function stop() {
  await ask(`${here}/stop`, new FormData());
}

async function copy(button) {
  const text = await (await fetch(button.dataset.copy)).text();
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else { // away from HTTPS and loopback there is no other way
    const sheet = document.body.appendChild(document.createElement("textarea"));
    sheet.value = text;
    sheet.select();
    document.execCommand("copy");
    sheet.remove();
  }
  tell(talk.dataset.saidCopied);
}

function told(error) { tell(error.message); }

let sent = false; // the first message goes by the browser itself, and once
window.addEventListener("pageshow", () => { sent = false; });

document.addEventListener("submit", (event) => {
  if (!talk) { if (sent && event.target === composer) event.preventDefault(); sent = true; return; }
  const { target, submitter } = event;
  if (submitter?.classList.contains("stop")) { event.preventDefault(); stop().catch(told); }
  else if (target === composer) { event.preventDefault(); speak().catch(told); }
  else if (target.matches("[data-act]")) { event.preventDefault(); act(target, submitter).catch(told); }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button).catch(told);
  const summary = event.target.closest(".thought > summary");
  if (summary) summary.parentElement.dataset.touched = "yes";
});

for (const moved of ["click", "focusin"]) document.addEventListener(moved, (event) => { // what stands open closes when one goes elsewhere
  for (const open of document.querySelectorAll(".menu[open], .settings[open]")) if (!open.contains(event.target)) open.open = false;
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // an input method is choosing its characters
  const field = event.target.closest?.("textarea");
  if (event.key === "Enter" && !event.shiftKey && field?.name === "text") { event.preventDefault(); field.form.requestSubmit(field.form.querySelector(".primary")); }
  else if (event.key === "Escape") escape(event.target);
  else if (event.key === "/" && !event.target.closest?.("input, textarea, select")) { event.preventDefault(); composer?.elements.text.focus(); }
});

function escape(target) {
  if (talk?.classList.contains("busy")) return void stop().catch(told);
  const open = document.querySelector(".edit[open], .menu[open], .settings[open]");
  if (open) { open.open = false; open.querySelector("summary").focus(); } else target.blur?.();
}

document.addEventListener("toggle", (event) => { // a door that opened: the pen goes there
  if (event.target.matches?.(".edit[open]")) event.target.querySelector("textarea").focus();
}, true);

if (composer) {
  const { text } = composer.elements;
  const chosen = composer.querySelector(".chosen");
  const tellChosen = () => {
    const { model, beside, temperature, budget, system } = composer.elements;
    const asked = system.value.trim() && composer.dataset.saidSystem;
    chosen.textContent = [[model.value, beside.value].filter(Boolean).join(" + "), `T ${temperature.value}`, budget.value && `≤ ${budget.value}`, asked].filter(Boolean).join(" · ");
  };
  text.value ||= sessionStorage.getItem(draft) ?? "";
  text.addEventListener("input", () => sessionStorage.setItem(draft, text.value));
  composer.addEventListener("submit", () => sessionStorage.removeItem(draft));
  composer.addEventListener("change", tellChosen);
  tellChosen();
  if (matchMedia("(min-width: 52rem)").matches || !talk) text.focus({ preventScroll: true });
}
if (talk) { settle(); toEnd(); follow(); }
