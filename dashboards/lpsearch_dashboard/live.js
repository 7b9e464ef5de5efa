"use strict";
// Asks the server whether the study has something new, and brings the page up to it without loading it again.
(() => {
  const POLL_MS = 2000;
  const live = document.getElementById("live");
  const message = document.getElementById("live-message");
  let etag = live.dataset.etag;
  let timer = 0;

  const say = (state, text) => {
    live.dataset.state = state;
    if (message.textContent !== text) message.textContent = text;
  };

  // ---- Elements stay where they can, so that focus, scrolling, open tables and choices do too ----
  const OURS = ["hidden", "open", "style"]; // what the page or its reader changed since it was loaded
  const getKey = (node) => [node.nodeName, node.id, node.dataset?.chart, node.dataset?.plan, node.dataset?.pick].join();
  const change = (old, fresh) => {
    if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    if (old.classList.contains("plot") || old.isEqualNode(fresh)) return; // page.js draws the figures
    for (const { name } of [...old.attributes]) {
      if (!OURS.includes(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    for (const { name, value } of [...fresh.attributes]) {
      if (!OURS.includes(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const kept = [...old.childNodes];
    const wanted = [...fresh.childNodes];
    wanted.forEach((node, place) => {
      if (place >= kept.length) old.append(node);
      else if (getKey(kept[place]) === getKey(node)) change(kept[place], node);
      else kept[place].replaceWith(node);
    });
    kept.slice(wanted.length).forEach((node) => node.remove());
  };
  const renew = ({ state, message: text, body, data }) => {
    const hasFigures = document.querySelector("[data-chart]") !== null;
    if (hasFigures !== (data !== null)) { // the first plan, or a fresh study: another page
      location.reload();
      return;
    }
    const fresh = document.createElement("template");
    fresh.innerHTML = body;
    for (const name of ["header", "main"]) change(document.querySelector(name), fresh.content.querySelector(name));
    if (data !== null) document.dispatchEvent(new CustomEvent("lpsearch:figures", { detail: data }));
    say(state, text);
  };

  const ask = () => fetch("/lpsearch/study.json", { headers: { "If-None-Match": etag }, cache: "no-store" });
  const poll = async () => {
    clearTimeout(timer);
    try {
      const answer = await ask().catch(() => null);
      if (answer?.status === 304) return;
      // Without a tag the next answer is whole, so that the page says again what is there.
      etag = answer?.ok ? answer.headers.get("ETag") : "";
      if (answer === null) say("lost", "The dashboard does not answer; start it again, and this page goes on.");
      else if (answer.ok) renew(await answer.json());
      else say("lost", (await answer.json().catch(() => ({}))).reason ?? `The dashboard failed (${answer.status}).`);
    } finally {
      if (!document.hidden) timer = setTimeout(poll, POLL_MS);
    }
  };
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  timer = setTimeout(poll, POLL_MS);
})();
