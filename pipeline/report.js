"use strict";
// The copy buttons and the trajectory viewer. The whole state of the viewer is in the address after "#", so every view
// has a link of its own. Text of policies and environments only ever becomes text nodes.

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const field = document.getElementById(button.dataset.copy);
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
    } catch {
      document.execCommand("copy"); // where the page may not use the clipboard itself
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

const byId = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); // strings become text nodes
  return node;
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function view(data) {
  // Each choice narrows the items that the next one chooses from.
  const NARROWING = ["env", "seed", "policy", "split"];
  const FIELDS = [...NARROWING, "kind", "find", "beside", "weights"];
  const field = Object.fromEntries(FIELDS.map((name) => [name, byId(`viewer-${name}`)]));
  let state = {};
  let list = [];

  const fromHash = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const toHash = (changes) => {
    const kept = Object.entries({ ...state, ...changes }).filter(([, value]) => value !== "");
    return "#" + new URLSearchParams(kept);
  };
  const go = (changes) => {
    // At once, and not on the hashchange that an address set here would bring: the next key may come before it.
    state = { ...state, ...changes };
    history.replaceState(null, "", toHash({}));
    render();
  };
  const unique = (values) => [...new Set(values.map(String))];

  function fill(name, values, labels = {}) {
    field[name].replaceChildren(...values.map((value) => make("option", { value }, labels[value] ?? value)));
    if (!values.includes(state[name])) state[name] = values[0] ?? "";
    field[name].value = state[name];
  }

  // How the policies of the chosen environment and seed weigh turns, by policy.
  function weightings() {
    const here = data.weightings.filter((one) => one.env === state.env && String(one.seed) === state.seed);
    return Object.fromEntries(here.map((one) => [one.policy, one]));
  }

  function weightLabel({ policy, gamma, per_token }) {
    return policy + (gamma === null ? "" : `, γ = ${gamma}`) + (per_token ? ", 1 / tokens" : "");
  }

  function weightsOf(side) {
    const weighting = weightings()[state.weights];
    const weights = data.weights[weighting?.table]?.[side.turns.length] ?? side.turns.map(() => 0);
    return weighting?.per_token ? weights.map((phi) => phi / side.tokens) : weights;
  }

  const phiText = (phi) => (phi > 0 && phi < 0.01 ? phi.toPrecision(2) : phi.toFixed(3));

  function choose() {
    let items = data.items;
    for (const name of NARROWING) {
      fill(name, unique(items.map((item) => item[name])), { pairs: "pairs: chosen | rejected" });
      items = items.filter((item) => String(item[name]) === state[name]);
    }
    fill("kind", ["", ...unique(items.map((item) => item.kind)).sort()], { "": "all kinds" });
    const labels = Object.entries(weightings()).map(([policy, weighting]) => [policy, weightLabel(weighting)]);
    fill("weights", labels.map(([policy]) => policy), Object.fromEntries(labels));
    state.find ??= "";
    if (field.find.value !== state.find) field.find.value = state.find;
    const words = state.find.toLowerCase().split(/\s+/);
    const text = (item) => [item.key, ...item.sides.map((side) => side.status)].join(" ").toLowerCase();
    list = items.filter(
      (item) => (!state.kind || item.kind === state.kind) && words.every((word) => text(item).includes(word)),
    );
    const current = list.find((item) => item.key === state.key) ?? list[0];
    state.key = current?.key ?? "";
    return current;
  }

  function twins(item) {
    // The same attempt at the same task by others, whom it can be read beside.
    if (!item || item.policy === "pairs") return [];
    const same = (other) => ["env", "seed", "split", "key"].every((name) => other[name] === item[name]);
    return data.items.filter((other) => other !== item && other.policy !== "pairs" && same(other));
  }

  function showList(current) {
    const entries = list.map((item) => {
      const link = make("a", { href: toHash({ key: item.key }) }, make("span", { class: "task" }, item.key.replace(`${item.env}:`, "")));
      const rewards = item.sides.map((side) => side.reward.toFixed(2)).join(" | ");
      link.append(make("span", { class: "score" }, rewards));
      if (item === current) link.setAttribute("aria-current", "true");
      return make("li", {}, link);
    });
    const hadFocus = byId("viewer-list").contains(document.activeElement);
    byId("viewer-list").replaceChildren(...entries);
    const link = byId("viewer-list").querySelector("[aria-current]");
    if (link) byId("viewer-list").scrollTop = link.offsetTop - byId("viewer-list").clientHeight / 2;
    if (hadFocus) link?.focus({ preventScroll: true });
    const group = data.groups.find((group) => NARROWING.every((name) => String(group[name]) === state[name]));
    byId("viewer-count").textContent = group
      ? `${list.length} listed; the page holds ${group.shown} of ${group.total}.` +
        (group.shown < group.total ? " See the others with python -m pipeline inspect." : "")
      : "";
  }

  function reply(text) {
    const at = text.search(/^[ \t]*Action:/m);
    const cut = at < 0 ? text.length : at;
    const parts = [make("span", { class: "thought" }, text.slice(0, cut)), make("span", { class: "action" }, text.slice(cut))];
    return make("p", { class: "reply" }, ...parts.filter((part) => part.textContent));
  }

  function turn(side, number, phi, before) {
    const [text, observation, reward, valid] = side.turns[number];
    const head = make("header", {}, make("b", {}, `turn ${number}`), make("span", { class: "phi" }, `φ ${phiText(phi)}`));
    if (valid === false) head.append(make("span", { class: "invalid" }, "invalid action"));
    if (reward !== null) {
      const gain = reward - before;
      const told = `reward ${reward.toFixed(2)}` + (Math.abs(gain) > 1e-9 ? ` (${gain > 0 ? "+" : "−"}${Math.abs(gain).toFixed(2)})` : "");
      head.append(make("span", { class: gain > 1e-9 ? "reward gain" : "reward" }, told));
    }
    const said = make("div", { class: "said", style: `--phi: ${phi}` }, head, reply(text));
    const heard = make("p", { class: "observation", tabindex: "0", "aria-label": `observation ${number}` }, observation);
    return make("article", { class: "turn" + (valid === false ? " wrong" : ""), "data-phi": phi, "data-side": side.title }, said, heard);
  }

  function headOf(side, weights) {
    const sum = weights.reduce((total, phi) => total + phi, 0);
    const facts = [side.source, `reward ${side.reward.toFixed(3)}`, side.status.replaceAll("_", " "), `T\u00a0=\u00a0${side.turns.length}`, `Σφ\u00a0=\u00a0${phiText(sum)}`];
    if (side.success !== null) facts.splice(2, 0, side.success ? "success" : "no success");
    const head = make("header", { class: `side ${side.title}` }, make("h3", {}, side.title), make("p", {}, facts.join(" · ")));
    if (side.note) head.append(make("p", { class: "note" }, side.note));
    return head;
  }

  function showItem(item) {
    if (!item) {
      byId("viewer-turns").replaceChildren(make("p", { class: "empty" }, "Nothing here matches."));
      byId("viewer-task").replaceChildren();
      return;
    }
    const others = twins(item);
    fill("beside", ["", ...others.map((other) => other.policy)], { "": "nobody" });
    field.beside.disabled = !others.length;
    const beside = others.find((other) => other.policy === state.beside);
    const sides = [...item.sides, ...(beside ? beside.sides : [])];
    const weights = sides.map(weightsOf);
    byId("viewer-place").textContent = `${list.indexOf(item) + 1} of ${list.length}`;
    const prompt = data.prompts[item.prompt].flatMap((message) => [make("dt", {}, message.role), make("dd", {}, message.content)]);
    byId("viewer-task").replaceChildren(
      make("h3", {}, item.key),
      make("p", { class: "text" }, item.task),
      make("details", {}, make("summary", {}, "What the policy reads before the task"), make("dl", {}, ...prompt)),
    );
    const cells = sides.map((side, s) => headOf(side, weights[s]));
    for (let t = 0; t < Math.max(...sides.map((side) => side.turns.length)); t++) {
      sides.forEach((side, s) =>
        cells.push(t < side.turns.length ? turn(side, t, weights[s][t], t ? side.turns[t - 1][2] : 0) : make("div", { class: "none" })),
      );
    }
    byId("viewer-turns").className = `turns sides-${sides.length}`;
    byId("viewer-turns").replaceChildren(...cells);
    byId("viewer-permuted").hidden = weightings()[state.weights]?.discount !== "permuted";
  }

  function render() {
    const current = choose();
    showItem(current); // first: it settles whom the item is read beside, which the list's links carry
    showList(current);
  }

  function step(by) {
    const next = list[list.findIndex((item) => item.key === state.key) + by];
    if (next) go({ key: next.key });
  }

  window.addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return; // a link to a section of the page
    state = fromHash();
    render();
  });
  for (const name of FIELDS) field[name].addEventListener("input", () => go({ [name]: field[name].value }));
  byId("viewer-form").addEventListener("submit", (event) => event.preventDefault());
  byId("viewer-previous").addEventListener("click", () => step(-1));
  byId("viewer-next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, .scroll")) return;
    const inList = byId("viewer-list").contains(event.target);
    const by = { ArrowLeft: -1, ArrowRight: 1, ...(inList && { ArrowUp: -1, ArrowDown: 1 }) }[event.key];
    if (!by) return;
    event.preventDefault();
    step(by);
  });
  state = location.hash.includes("=") ? fromHash() : {};
  render();
  if (location.hash.includes("=")) byId("trajectories").scrollIntoView();
}

unpack(byId("data").textContent).then(view, (error) => {
  byId("viewer-turns").replaceChildren(make("p", { class: "empty" }, `This browser cannot unpack the trajectories: ${error}`));
});
