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

  let waits = false;
  new MutationObserver(() => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; name(); });
  }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["class"] });
  name();
}
