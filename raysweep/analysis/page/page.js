"use strict";
// Tables that sort and filter, and buttons that copy. Without it the page shows all but the table of trials.
(() => {
  const PORTION = 50; // rows of the table of trials that are there at once: thousands take a phone seconds
  const MOST_CHOICES = 30;
  const NOTHING = "\u2013";

  // Numbers by size, words by letter (2 before 10), nothing last whichever way.
  const words = new Intl.Collator("en", { numeric: true });
  const compared = (one, other, direction) => {
    if (one === null || other === null) return (one === null) - (other === null);
    return direction * (typeof one === "number" && typeof other === "number" ? one - other : words.compare(one, other));
  };
  const sorted = (items, valueOf, direction) =>
    items.map((item) => [valueOf(item), item]).sort((a, b) => compared(a[0], b[0], direction)).map(([, item]) => item);

  // A click sorts, a second one the other way; says so to those who hear the page.
  const sortsBy = (head, order) => {
    const columns = [...head.querySelectorAll("th")];
    columns.forEach((column, place) => column.querySelector("button").addEventListener("click", () => {
      const direction = column.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      columns.forEach((other) => other.removeAttribute("aria-sort"));
      column.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      order(place, direction);
    }));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const valueOf = (place) => (row) => {
      const { dataset, textContent } = row.cells[place];
      if ("none" in dataset) return null;
      return "value" in dataset ? Number(dataset.value) : textContent;
    };
    sortsBy(table.tHead, (place, direction) => body.append(...sorted([...body.rows], valueOf(place), direction)));
  }

  const fixed = (digits) => (value) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const hundredths = fixed(2), tenths = fixed(1), whole = fixed(0);
  const SHOWN = {
    perplexity: (value) => (value < 1000 ? hundredths(value) : value < 1e6 ? whole(value) : value.toExponential(2)),
    seconds: (value) => (value < 10 ? hundredths(value) : value < 1000 ? tenths(value) : whole(value)),
    mebibytes: (value) => { const size = value / 1048576; return size < 1000 ? tenths(size) : whole(size); },
    error: (value) => (value === 0 ? "0" : value.toPrecision(3)),
  };
  const element = (name, text, kind) => {
    const made = document.createElement(name);
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  };

  const { columns, rows } = JSON.parse(document.getElementById("trial-data").textContent);
  const table = document.getElementById("all-trials"), tools = document.querySelector(".tools");
  const more = document.querySelector(".more"), search = tools.querySelector("input"), told = tools.querySelector("output");
  const texts = rows.map((row) => row.filter((value) => typeof value === "string").join(" ").toLowerCase());
  const selects = [];
  let order = rows.map((_, place) => place), shown = [], there = 0;

  const cell = (value, { kind }) => {
    const how = SHOWN[kind];
    const text = value === null || value === "" ? (how ? NOTHING : "") : how ? how(value) : value;
    return element("td", text, how ? "number" : value === "failed" ? "failed" : kind);
  };
  const add = () => {
    const made = shown.slice(there, there + PORTION).map((place) => {
      const line = document.createElement("tr");
      line.append(...rows[place].map((value, column) => cell(value, columns[column])));
      return line;
    });
    table.tBodies[0].append(...made);
    there += made.length;
    more.hidden = there >= shown.length;
  };
  const show = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = selects.filter(({ select }) => select.value !== "");
    shown = order.filter((place) =>
      wanted.every((word) => texts[place].includes(word)) &&
      chosen.every(({ select, column }) => rows[place][column] === select.value));
    const all = rows.length.toLocaleString("en");
    told.textContent = shown.length === rows.length ? `${all} trials` : `${shown.length.toLocaleString("en")} of ${all} trials`;
    table.tBodies[0].replaceChildren();
    there = 0;
    add();
  };

  const head = document.createElement("tr");
  columns.forEach(({ title, kind }, column) => {
    const made = element("th", "", kind in SHOWN ? "number" : "");
    const button = element("button", title);
    made.scope = "col";
    button.type = "button";
    made.append(button);
    head.append(made);
    const values = kind === "choice" ? [...new Set(rows.map((row) => row[column]).filter(Boolean))].sort(words.compare) : [];
    if (values.length < 2 || values.length > MOST_CHOICES) return;
    const select = document.createElement("select");
    select.setAttribute("aria-label", title);
    select.append(...["", ...values].map((value) => {
      const option = element("option", value || `every ${title}`);
      option.value = value;
      return option;
    }));
    select.addEventListener("change", show);
    selects.push({ select, column });
    tools.querySelector(".choices").append(select);
  });
  table.tHead.append(head);
  sortsBy(table.tHead, (column, direction) => {
    order = sorted(rows.map((_, place) => place), (place) => (rows[place][column] === "" ? null : rows[place][column]), direction);
    show();
  });
  search.addEventListener("input", show);
  more.querySelector("button").addEventListener("click", add);
  tools.hidden = false;
  show();

  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // of a page that browsers do not trust, such as a file: the old way
      const area = element("textarea", text);
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      await copied(button.dataset.text ?? button.parentElement.querySelector("pre").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
