// Light or dark: as the system has it, until the reader chooses. Runs before the first paint, so that nothing flashes.
(() => {
  "use strict";
  const KEY = "arcface-theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };
  const root = document.documentElement;

  // Storage may be forbidden; the choice then holds for this page.
  const remembered = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  };
  const remember = (theme) => {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // Nothing to do about it.
    }
  };

  const show = (theme) => {
    if (theme === "system") {
      delete root.dataset.theme;
    } else {
      root.dataset.theme = theme;
    }
  };

  let theme = remembered() in NEXT ? remembered() : "system";
  show(theme);

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => {
      button.textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
      button.setAttribute("aria-label", `Colours: ${button.textContent}. Change to ${NEXT[theme]}.`);
    };
    button.addEventListener("click", () => {
      theme = NEXT[theme];
      show(theme);
      remember(theme);
      label();
    });
    label();
    button.hidden = false;
  });
})();
