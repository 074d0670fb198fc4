// Runs once when the page has loaded: the light and dark switch, and labels for screen readers where Gradio has none.
() => {
  document.querySelector(".bar .shade").addEventListener("click", () => document.body.classList.toggle("dark"));

  function name() {
    document.querySelector("#composer textarea")?.setAttribute("aria-label", "Your question");
    for (const shown of document.querySelectorAll("#chat [data-testid=user]:has(.pictures)")) {
      const names = [...shown.querySelectorAll("img")].map((picture) => picture.alt);
      shown.setAttribute("aria-label", `your pictures: ${names.join(", ")}`);
    }
    for (const button of document.querySelectorAll("#side .label-wrap")) {
      button.setAttribute("aria-expanded", String(button.classList.contains("open")));
      button.querySelector(".icon")?.setAttribute("aria-hidden", "true");
    }
  }

  // The chat shows questions as HTML (typed_html of chat.py). Editing or copying one must give the text as it was typed.
  const typed = /<div class="typed">([^]*?)<\/div>/g;
  const asTyped = (text) => text.replace(typed, (_, inner) => {
    const holder = document.createElement("textarea");
    holder.innerHTML = inner.replaceAll("<br>", "\n");
    return holder.value;
  });
  function editAsTyped() {
    for (const box of document.querySelectorAll("#chat textarea")) {
      const text = asTyped(box.value);
      if (text === box.value) continue;
      box.value = text;
      box.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }
  if (navigator.clipboard) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(asTyped(text));
  }

  // Scrolls to the end of a question that was just sent: Gradio does not always do so, but follows the answer from there.
  let numQuestions = 0;
  function showNewest() {
    const count = document.querySelectorAll("#chat .message.user").length;
    const chat = document.querySelector("#chat .bubble-wrap");
    if (count > numQuestions) chat?.scrollTo(0, chat.scrollHeight);
    numQuestions = count;
  }

  let waits = false;
  new MutationObserver(() => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; name(); editAsTyped(); showNewest(); });
  }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["class"] });
  name();
}
