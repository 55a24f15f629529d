"use strict";
/** Light or dark: what the reader chose last, else what the system prefers; the button switches.
 *  Calls `changed` after a switch; returns whether it is dark now. */
function followTheme(changed) {
  const root = document.documentElement;
  const button = document.getElementById("theme");

  function set(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(dark));
    return dark;
  }

  button.addEventListener("click", () => {
    const dark = set(root.dataset.theme !== "dark");
    try { localStorage.setItem("moescope-theme", dark ? "dark" : "light"); } catch (error) { /* from a file, some browsers keep nothing */ }
    changed(dark);
  });
  let kept = null;
  try { kept = localStorage.getItem("moescope-theme"); } catch (error) { kept = null; }
  return set(kept ? kept === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches);
}
