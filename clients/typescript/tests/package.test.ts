// The package as it is published: its files, its promises in the README, and the example that uses it.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { test } from "node:test";

import { BOUND, Stage } from "./stage.js";

const README = readFileSync("../README.md", "utf8");
const PACKAGE = JSON.parse(readFileSync("node_modules/fetchproxy/package.json", "utf8"));

/** The code blocks of the README, in order. */
function blocks(): string[] {
  return [...README.matchAll(/```js\n(.*?)```/gs)].map(([, code]) => code!);
}

/** Runs a program against the fake until every message has ended. Then stops it as a person does. */
async function follow(stage: Stage, program: string): Promise<string> {
  const { address } = stage.fake.client;
  const env = { ...process.env, FETCH_PROXY_ADDR: address, NODE_TEST_CONTEXT: undefined };
  const child = spawn(process.execPath, [program], { env, stdio: ["ignore", "pipe", "inherit"] });
  let said = "";
  child.stdout.on("data", (text) => (said += text));
  const ended = once(child, "exit", { signal: AbortSignal.timeout(2 * BOUND) });
  try {
    await stage.fake.settled();
    child.kill("SIGTERM");
    assert.deepEqual(await ended, [0, null]);
  } finally {
    child.kill("SIGKILL");
  }
  return said;
}

test("the worker of the README works as it stands", () =>
  Stage.with(async (stage) => {
    const [code] = blocks();
    await mkdir(".build/readme", { recursive: true });
    await writeFile(".build/readme/worker.js", code!);
    const good = stage.fake.publish({ email: "ann@example.com" });
    const bad = stage.fake.publish({ email: "" });
    await follow(stage, ".build/readme/worker.js");
    assert.deepEqual(good.settlements, [{ action: "ack", attempt: 1 }]);
    assert.equal(bad.settlements[0]?.action, "term");
  }));

test("the unit test of the README works as it stands", async () => {
  const [, code] = blocks();
  await mkdir(".build/readme", { recursive: true });
  await writeFile(".build/readme/unit.js", code!);
  const env = { ...process.env, NODE_TEST_CONTEXT: undefined };
  const args = ["--test", "--test-reporter=tap", ".build/readme/unit.js"];
  const child = spawn(process.execPath, args, { env, stdio: ["ignore", "pipe", "inherit"] });
  let said = "";
  child.stdout.on("data", (text) => (said += text));
  const [exit] = await once(child, "exit", { signal: AbortSignal.timeout(2 * BOUND) });
  assert.equal(exit, 0, said);
  assert.match(said, /^# pass 1$/m);
});

test("the example works with the package", () =>
  Stage.with(async (stage) => {
    const kinds = ["ok", "flaky", "broken"];
    const records = kinds.map((kind, id) => stage.fake.publish({ id, kind }));
    const said = await follow(stage, ".build/example/worker.js");
    const settled = records.map(({ settlements }) => settlements.map(({ action }) => action));
    assert.deepEqual(settled, [["ack"], ["nak", "ack"], ["term"]]);
    assert.match(said, /task 0/);
  }));

test("the package has the version of fetch-proxy, and its licence", () => {
  const cargo = readFileSync("../../../Cargo.toml", "utf8");
  assert.equal(PACKAGE.version, /^version = "(.*)"$/m.exec(cargo)?.[1]);
  assert.equal(PACKAGE.license, "Apache-2.0");
  const licence = (folder: string) => readFileSync(`${folder}/LICENSE`, "utf8");
  assert.equal(licence("node_modules/fetchproxy"), licence("../../.."));
});

test("only fetchproxy/otel needs OpenTelemetry", () => {
  assert.ok(!("@opentelemetry/api" in PACKAGE.dependencies));
  const folder = "node_modules/fetchproxy/dist";
  const files = readdirSync(folder, { recursive: true, encoding: "utf8" });
  const needs = files.filter(
    (file) =>
      /\.js$/.test(file) && /@opentelemetry/.test(readFileSync(`${folder}/${file}`, "utf8")),
  );
  assert.deepEqual(needs, ["otel.js"]);
});
