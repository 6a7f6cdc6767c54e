// An option is chosen by opening the address that holds it, as on the official site. The focus stays on the option, so
// that arrow keys walk through the values.
const KEPT = "webshop-option";

document.addEventListener("change", ({ target }) => {
  if (!target.dataset.url) return;
  sessionStorage.setItem(KEPT, target.id);
  location.assign(target.dataset.url);
});

const kept = sessionStorage.getItem(KEPT);
sessionStorage.removeItem(KEPT);
if (kept) document.getElementById(kept)?.focus();

// A page that comes back from the browser's memory shows what its own address says.
addEventListener("pageshow", ({ persisted }) => {
  if (!persisted) return;
  for (const input of document.querySelectorAll("input[type=radio]")) input.checked = input.defaultChecked;
});
