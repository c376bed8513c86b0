// Loaded before the page is painted, so that a chosen theme does not flash.
try {
  const { theme } = JSON.parse(localStorage.getItem("cabochon.settings") ?? "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Unreadable settings are replaced by the defaults in store.js.
}
