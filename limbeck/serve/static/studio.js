// What every page shares: keys that are shown on their buttons, and a voice for what just happened.

/** Say something to everybody: eyes see it for a moment, screen readers hear it. */
export function tell(text) {
  const voice = document.getElementById("told");
  voice.textContent = text;
  clearTimeout(tell.timer);
  tell.timer = setTimeout(() => { voice.textContent = ""; }, 4000);
}

/** Whether somebody is typing, so that letters are letters and no commands. */
export function typing(target) {
  return target instanceof Element && target.closest("input:not([type=checkbox], [type=radio]), textarea, select, [contenteditable='true']") !== null;
}

/** POST as JSON; the answer's JSON, or an Error whose message is the server's sentence. */
export async function post(url, body) {
  const answer = await fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  const said = answer.headers.get("content-type")?.includes("json") ? await answer.json() : {};
  if (!answer.ok) throw new Error(said.error?.message ?? said.detail ?? answer.statusText);
  return said;
}

/** The events of a server-sent stream, one object each, until it ends. Leaving the loop closes it. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const event of whole) {
        const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

// A button with data-key="a" is pressed by that key, and shows it (its <kbd>); never while somebody types.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || typing(event.target)) return;
  const pressed = [...document.querySelectorAll("[data-key]")].find((one) => one.dataset.key === event.key && !one.disabled && one.offsetParent !== null);
  if (!pressed) return;
  event.preventDefault();
  pressed.click();
});
