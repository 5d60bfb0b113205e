"use strict";
/*
 * Drives a headless Chromium for chromium.py. Each line of standard input is an order (JSON), each
 * line of standard output a report of the page that is then shown:
 *
 *   {"do": "visit", "url", "width", "dark", "scripts", "cookies": {name: value}}
 *   {"do": "go", "url"}                    {"do": "resize", "width", "dark"}
 *   {"do": "click", "selector"}            {"do": "fill", "selector", "text"}
 *   {"do": "choose", "selector", "text"}   {"do": "attach", "selector", "paths"}
 *   {"do": "press", "keys"}                {"do": "wait", "selector", "hidden"}
 *   {"do": "look"}
 *
 * Any order may have "shot", the path of a picture to take; "axe": whether to look for barriers;
 * "expression", whose value is reported; and "inside": whether it is about the frame in the page.
 */

const readline = require("node:readline");
const { chromium } = require("playwright-core");
const axe = require("axe-core");
const { HtmlValidate } = require("html-validate");

const PATIENCE = 20000; // milliseconds, for whatever a page has to do
const HEIGHT = 900; // pixels of the window
const validator = new HtmlValidate({ root: true, extends: ["html-validate:standard"] });
const validated = new Map(); // text of a page -> faults in it: most orders show a page again

let browser;
let page; // the one that orders are about
let runScripts; // runScripts(whether) switches the page's scripts on or off
let documents = []; // responses with a document, in the order of their arrival
let messages = []; // what the console said since the last report
let foreign = []; // URLs on other hosts, which were asked for
let requests = []; // all URLs that were asked for

async function visit(order) {
  if (page) await page.context().close();
  const host = new URL(order.url).host;
  const context = await browser.newContext({
    viewport: { width: order.width, height: HEIGHT },
    colorScheme: order.dark ? "dark" : "light",
    reducedMotion: "reduce", // no picture of a half faded button
    permissions: ["clipboard-read", "clipboard-write"],
  });
  context.setDefaultTimeout(PATIENCE);
  await context.addCookies(
    Object.entries(order.cookies).map(([name, value]) => ({ name, value, url: order.url })));

  page = await context.newPage();
  const session = await context.newCDPSession(page);
  runScripts = (whether) =>
    order.scripts || session.send("Emulation.setScriptExecutionDisabled", { value: !whether });
  await runScripts(false);
  documents = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type()) && !isOfBrowser(message)) {
      messages.push(message.text());
    }
  });
  page.on("pageerror", (error) => messages.push(String(error)));
  page.on("dialog", (dialog) => {
    messages.push(`dialog: ${dialog.message()}`);
    return dialog.dismiss();
  });
  context.on("request", (request) => {
    const url = new URL(request.url());
    requests.push(request.url());
    if (/^(https?|wss?):$/.test(url.protocol) && url.host !== host) foreign.push(request.url());
  });
  page.on("response", (response) => {
    const request = response.request();
    if (request.isNavigationRequest() && request.frame() === page.mainFrame()) {
      documents.push(response);
    }
  });
  await go(order);
}

async function go(order) {
  await page.goto(order.url, { waitUntil: "load" });
}

/* What an order is about: the page, or the frame in it. */
function place(order) {
  return order.inside ? page.frames().find((frame) => frame !== page.mainFrame()) : page;
}

/* Whether a message only says that the page itself has a status like 404, which the report says; or
   that there is no icon, for which the browser asks by itself. */
function isOfBrowser(message) {
  const { url } = message.location();
  return message.text().startsWith("Failed to load resource: the server responded")
    && (new URL(url).pathname === "/favicon.ico"
      || documents.some((response) => response.url() === url));
}

async function resize(order) {
  await page.emulateMedia({ colorScheme: order.dark ? "dark" : "light" });
  await page.setViewportSize({ width: order.width, height: HEIGHT });
}

async function click(order) {
  await place(order).click(order.selector);
  await page.waitForLoadState("load");
}

async function fill(order) {
  await place(order).fill(order.selector, order.text);
}

async function choose(order) {
  await place(order).selectOption(order.selector, order.text);
}

async function attach(order) {
  await page.setInputFiles(order.selector, order.paths);
}

async function press(order) {
  for (const key of order.keys) await page.keyboard.press(key);
  await page.waitForLoadState("load");
}

async function wait(order) {
  await place(order).waitForSelector(order.selector, { state: order.hidden ? "attached" : "visible" });
}

async function look() {}

async function report(order) {
  const response = documents[documents.length - 1];
  const type = response.headers()["content-type"] || "";
  const text = await response.text();
  const [width, excess] = await page.evaluate(() => {
    const root = document.documentElement;
    return [root.clientWidth, root.scrollWidth - root.clientWidth];
  });
  if (order.shot) await page.screenshot({ path: order.shot, fullPage: true });

  const found = {
    status: response.status(),
    url: page.url(),
    title: await page.title(),
    text: await page.innerText("body"),
    width,
    excess,
    barriers: order.axe ? await barriers() : [],
    invalid: type.startsWith("text/html") ? await faults(text) : [],
    messages,
    foreign,
    requests,
    shot: order.shot || null,
    value: order.expression ? (await place(order).evaluate(order.expression)) ?? null : null,
  };
  messages = [];
  foreign = [];
  requests = [];
  return found;
}

/* What axe-core finds that hinders people seriously, as texts. */
async function barriers() {
  await page.evaluate(axe.source);
  const result = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  return result.violations
    .filter((each) => ["serious", "critical"].includes(each.impact))
    .map((each) => `${each.id}: ${each.help}: ${each.nodes.slice(0, 3).map((n) => n.html).join(" ")}`);
}

/* What is wrong with the HTML of a page, as texts. */
async function faults(text) {
  if (!validated.has(text)) {
    const { results } = await validator.validateString(text);
    validated.set(text, results.flatMap((each) => each.messages)
      .filter((each) => each.severity === 2 && !isOfDescription(each))
      .map((each) => `${each.line}:${each.column} ${each.ruleId}: ${each.message}`));
  }
  return validated.get(text);
}

/* Whether it is the attribute `align`, which descriptions may have: all browsers know it, and the style
   of a page has no room for classes in its place. */
function isOfDescription(fault) {
  return fault.ruleId === "no-deprecated-attr" && fault.message.startsWith('Attribute "align"');
}

async function obey(order) {
  await { visit, go, resize, click, fill, choose, attach, press, wait, look }[order.do](order);
  await runScripts(true); // axe-core is one; those of a page that came without them did not run
  try {
    return await report(order).catch((error) => {
      if (!error.message.includes("Execution context was destroyed")) throw error;
      return page.waitForLoadState("load").then(() => report(order)); // a script went to another page
    });
  } finally {
    await runScripts(false);
  }
}

function patience() {
  return new Promise((_, reject) => {
    setTimeout(() => reject(new Error(`nothing in ${2 * PATIENCE} ms`)), 2 * PATIENCE).unref();
  });
}

async function main() {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: [
      "--no-sandbox", // root, in a container
      "--disable-dev-shm-usage",
      // nothing leaves this machine, whatever a page asks for
      "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    ],
  });
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    let answer;
    try {
      answer = await Promise.race([obey(order), patience()]);
    } catch (error) {
      answer = { error: `${order.do} ${order.url || order.selector || ""}: ${error.message}` };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
  await browser.close();
}

main().catch((error) => {
  process.stderr.write(`${error.stack}\n`);
  process.exit(1);
});
