"use strict";

const films = [...document.querySelectorAll(".film")].filter((film) => film.querySelector("input")).map((film) => ({
  slider: film.querySelector("input"),
  output: film.querySelector("output"),
  pictures: [...film.querySelectorAll("img[data-class]")],
  ...JSON.parse(film.querySelector("script").textContent),
}));

function show(film, index) {
  const step = film.steps[index];
  film.slider.value = index;
  film.slider.setAttribute("aria-valuetext", `step ${step}`);
  film.output.textContent = step;
  film.pictures.forEach((picture) => {
    picture.src = film.frames[index][picture.dataset.row];
    picture.alt = `${picture.dataset.class}, step ${step}`;
  });
}

for (const film of films) {
  film.slider.addEventListener("input", () => {
    const index = Number(film.slider.value);
    show(film, index);
    if (document.getElementById("together")?.checked) {
      const share = index / Math.max(film.steps.length - 1, 1);
      films.filter((other) => other !== film).forEach((other) => show(other, Math.round(share * (other.steps.length - 1))));
    }
  });
}

function valueOf(cell) {
  const text = cell.dataset.value ?? cell.textContent;
  const number = Number.parseFloat(text);
  return Number.isNaN(number) ? text.trim() : number;
}

function sort(table, column, heading) {
  const ascending = heading.getAttribute("aria-sort") === "descending";
  table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const order = (a, b) => {
    const [x, y] = [valueOf(a.cells[column]), valueOf(b.cells[column])];
    const sign = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return ascending ? sign : -sign;
  };
  body.append(...[...body.rows].sort(order));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, column, heading));
    heading.append(button);
  });
}

async function copy(block, button) {
  try {
    await navigator.clipboard.writeText(block.textContent);
  } catch {
    getSelection().selectAllChildren(block);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
}

for (const box of document.querySelectorAll(".commands")) {
  const button = box.querySelector("button");
  button.hidden = false;
  button.addEventListener("click", () => copy(box.querySelector("pre"), button));
}
