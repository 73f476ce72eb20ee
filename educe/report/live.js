// A page that is served while its run goes on asks for news every two seconds and puts it in place of the old.
let tag = `"${document.body.dataset.tag}"`;
const look = async () => {
  const line = document.querySelector(".live");
  try {
    const found = await fetch(location.pathname, { headers: { "If-None-Match": tag }, cache: "no-store", redirect: "error" });
    if (found.status === 403) throw new Error("this page was opened by another link");
    if (found.status === 200) {
      const page = new DOMParser().parseFromString(await found.text(), "text/html"), fresh = page.querySelector("main");
      tag = found.headers.get("ETag") ?? "";
      if (fresh) replace(fresh);
      document.title = page.title;
    }
    if (line?.isConnected && line.classList.contains("lost")) { line.textContent = line.dataset.said; line.classList.remove("lost"); }
  } catch {
    if (line && !line.classList.contains("lost")) {
      line.dataset.said = line.textContent;
      line.textContent = "Not updating: educe watch has ended, or this link is of another one.";
      line.classList.add("lost");
    }
  }
  setTimeout(look, 2000);
};
const replace = (fresh) => {
  const main = document.querySelector("main"), summary = (d) => d.querySelector("summary").textContent;
  const open = new Set([...main.querySelectorAll("details[open]")].map(summary));
  const sorted = [...main.querySelectorAll(".scroll")].map((s) => {
    const th = s.querySelector("th[aria-sort]");
    return th && [s.getAttribute("aria-label"), th.cellIndex, th.getAttribute("aria-sort") === "ascending"];
  }).filter(Boolean);
  const at = main.contains(document.activeElement) && document.activeElement.id;
  for (const d of fresh.querySelectorAll("details")) if (open.has(summary(d))) d.open = true;
  main.replaceWith(fresh);
  ready(fresh);
  for (const [label, k, up] of sorted) {
    const s = [...fresh.querySelectorAll(".scroll")].find((s) => s.getAttribute("aria-label") === label);
    if (s) sortBy(s.querySelector("table"), k, up);
  }
  if (at) document.getElementById(at)?.focus();
};
setTimeout(look, 500);
