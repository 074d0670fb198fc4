// Runs once when the page is there: the light and dark switch, and names for screen readers where Gradio gives none.
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

  // Questions are shown as HTML that reads as they were typed (typed_html of chat.py); to edit or copy one is to get it so.
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

  // A question that was just sent is shown to its end; Gradio follows from there, and not always to there.
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
