// The leases of a worker, its end, and its faults, in both loops, against the fake.

import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { Term, Worker, type Message } from "fetchproxy";

import { gate, MODES, Stage } from "./stage.js";

for (const mode of MODES) {
  test(`${mode}: a handler is cancelled when its lease is lost, and its outcome is dropped`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({});
      const begun = gate();
      const reasons: unknown[] = [];
      const handler = async ({ deliveryCount }: Message, signal: AbortSignal) => {
        if (deliveryCount > 1) return;
        begun.open();
        // A handler that does not care.
        await new Promise((resolve) => signal.addEventListener("abort", resolve));
        reasons.push(signal.reason);
        throw new Term("too late");
      };
      const running = stage.run(handler, { mode, lease: 1_000, concurrency: 1 });
      await begun.opened;
      stage.fake.expire(record);
      const { reason, error } = await stage.seen("lost");
      await running;
      assert.equal(reason, "LEASE_EXPIRED");
      assert.deepEqual(reasons, [error]);
      assert.deepEqual(record.settlements, [{ action: "ack", attempt: 2 }]);
      assert.deepEqual(stage.told, ["lost", "acked"]);
    }));

  test(`${mode}: a handler that hangs has its message for atMost, and then another has it`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({});
      const handler = async ({ deliveryCount }: Message, signal: AbortSignal) => {
        if (deliveryCount === 1) await sleep(3_600_000, undefined, { signal });
      };
      await stage.run(handler, { mode, atMost: 1_000 });
      assert.deepEqual(stage.told, ["lost", "acked"]);
      assert.deepEqual(record.settlements, [{ action: "ack", attempt: 2 }]);
    }));

  test(`${mode}: a handler that ignores its signal keeps its place until it returns`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({});
      const [begun, end] = [gate(), gate()];
      let [running, most] = [0, 0];
      const handler = async ({ deliveryCount }: Message) => {
        most = Math.max(most, ++running);
        begun.open();
        if (deliveryCount === 1) await end.opened;
        running--;
      };
      const done = stage.run(handler, { mode, concurrency: 1, lease: 1_000 });
      await begun.opened;
      stage.fake.expire(record);
      await stage.seen("lost");
      await sleep(50);
      end.open();
      await done;
      assert.equal(most, 1);
      assert.deepEqual(stage.told, ["lost", "acked"]);
    }));

  test(`${mode}: so many handlers run at once, and no more`, () =>
    Stage.with(async (stage) => {
      for (let id = 0; id < 40; id++) stage.fake.publish({ id });
      let [running, most] = [0, 0];
      const handler = async () => {
        most = Math.max(most, ++running);
        await sleep(5);
        running--;
      };
      await stage.run(handler, { mode, concurrency: 4 });
      assert.equal(most, 4);
      assert.equal(stage.told.filter((name) => name === "acked").length, 40);
    }));

  test(`${mode}: the lease of slow work is kept, also behind other work`, () =>
    Stage.with(
      async (stage) => {
        const records = [1, 2, 3].map((id) => stage.fake.publish({ id }));
        await stage.run(() => sleep(1_000), { mode, concurrency: 1, batch: 3, grace: 1_000 });
        const acked = records.map(({ settlements }) => settlements);
        assert.deepEqual(acked, Array(3).fill([{ action: "ack", attempt: 1 }]));
      },
      { ackWait: 600 },
    ));

  test(`${mode}: a stop lets handlers finish, and takes no more messages`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({ id: 1 });
      const [begun, end] = [gate(), gate()];
      const worker = stage.worker(
        async () => {
          begun.open();
          await end.opened;
        },
        { mode, concurrency: 2 },
      );
      const running = worker.run();
      await begun.opened;
      worker.stop();
      const late = stage.fake.publish({ id: 2 });
      await sleep(50);
      end.open();
      await running;
      assert.deepEqual(record.settlements, [{ action: "ack", attempt: 1 }]);
      assert.ok(late.settlements.every(({ action, delay }) => action === "nak" && delay === 0));
      assert.equal(stage.events.at(-1)?.name, "stopped");
    }));

  test(`${mode}: a worker that waits stops at once`, () =>
    Stage.with(async (stage) => {
      const worker = stage.worker(() => undefined, { mode, maxWait: 300_000 });
      const running = worker.run();
      await stage.seen("ready");
      await sleep(50);
      worker.stop();
      await running;
      assert.deepEqual(stage.told, []);
    }));

  test(`${mode}: a second stop cancels handlers, and gives their messages back`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({});
      const begun = gate();
      const worker = stage.worker(
        async (_, signal) => {
          begun.open();
          await sleep(3_600_000, undefined, { signal });
        },
        // With one handler, no Fetch waits that could take the message again.
        { mode, concurrency: 1 },
      );
      const running = worker.run();
      await begun.opened;
      worker.stop();
      worker.stop();
      await running;
      assert.deepEqual(record.settlements, [{ action: "nak", attempt: 1, delay: 0 }]);
      assert.deepEqual(stage.told, ["returned"]);
    }));

  test(`${mode}: the end of stopTimeout gives messages back, but not a last attempt`, () =>
    Stage.with(
      async (stage) => {
        const record = stage.fake.publish({});
        const begun = gate();
        const worker = stage.worker(
          async () => {
            begun.open();
            await new Promise(() => {});
          },
          { mode, stopTimeout: 20 },
        );
        const running = worker.run();
        await begun.opened;
        worker.stop();
        await running;
        assert.deepEqual(record.settlements, []);
        assert.deepEqual(stage.told, ["lost"]);
      },
      { maxDeliver: 1 },
    ));

  test(`${mode}: a call that fails for now is repeated, and that is told`, () =>
    Stage.with(async (stage) => {
      const method = mode === "consume" ? "Consume" : "Fetch";
      stage.fake.fail(method, "NATS_UNAVAILABLE");
      stage.fake.failSettlement("LEASE_BUSY");
      const record = stage.fake.publish({});
      await stage.run(() => undefined, { mode });
      assert.deepEqual(record.settlements, [{ action: "ack", attempt: 1 }]);
      assert.deepEqual(stage.told, ["retry", "retry", "acked"]);
      const reasons = stage.events.flatMap((event) => (event.name === "retry" ? event.reason : []));
      assert.deepEqual(reasons, ["NATS_UNAVAILABLE", "LEASE_BUSY"]);
    }));

  test(`${mode}: a message whose settlement is refused is lost`, () =>
    Stage.with(async (stage) => {
      stage.fake.failSettlement("LEASE_EXPIRED");
      const record = stage.fake.publish({});
      const running = stage.run(() => undefined, { mode });
      await stage.seen("lost");
      stage.fake.expire(record);
      await running;
      assert.deepEqual(stage.told, ["lost", "acked"]);
    }));

  test(`${mode}: a refusal that a person must look at ends the worker`, () =>
    Stage.with(async (stage) => {
      stage.fake.fail(mode === "consume" ? "Consume" : "Fetch", "NOT_ALLOWED");
      const running = stage.worker(() => undefined, { mode }).run();
      await assert.rejects(running, { name: "FetchProxyError", reason: "NOT_ALLOWED", code: 7 });
      assert.deepEqual(stage.told, []);
      assert.notEqual(stage.events.at(-1)?.name, "stopped");
    }));

  test(`${mode}: an event function that fails does not break the worker`, (context) =>
    Stage.with(async (stage) => {
      const warn = context.mock.method(console, "warn", () => undefined);
      const record = stage.fake.publish({});
      const onEvent = () => {
        throw new Error("broken");
      };
      await stage.run(() => undefined, { mode, onEvent });
      assert.deepEqual(record.settlements, [{ action: "ack", attempt: 1 }]);
      assert.equal(warn.mock.callCount(), 3);
    }));

  test(`${mode}: without an event function, warnings are logged, and nothing else`, (context) =>
    Stage.with(async (stage) => {
      const warn = context.mock.method(console, "warn", () => undefined);
      stage.fake.publish(1);
      stage.fake.publish(2);
      const handler = ({ data }: Message) => (data === 1 ? undefined : new Term("never"));
      await stage.run(handler, { mode, onEvent: undefined });
      const lines = warn.mock.calls.map(({ arguments: [line] }) => line);
      assert.deepEqual(lines, ["fetchproxy: message 2 is terminated: never"]);
    }));
}

test("fetch: a stop gives back what waits, and handles what waits on its last attempt", async () => {
  for (const maxDeliver of [0, 1])
    await Stage.with(
      async (stage) => {
        for (const id of [1, 2, 3]) stage.fake.publish({ id });
        const [begun, end] = [gate(), gate()];
        const handler = async () => {
          begun.open();
          await end.opened;
        };
        const worker = stage.worker(handler, { mode: "fetch", concurrency: 1, batch: 3 });
        const running = worker.run();
        await begun.opened;
        worker.stop();
        if (maxDeliver === 0) await stage.seen("returned", 2);
        end.open();
        await running;
        const expected = maxDeliver
          ? ["acked", "acked", "acked"]
          : ["returned", "returned", "acked"];
        assert.deepEqual(stage.told, expected);
      },
      { maxDeliver },
    );
});

test("fetch: a call that settles and fails is repeated as a whole", () =>
  Stage.with(async (stage) => {
    stage.fake.fail("Settle", "CALL_LIMIT");
    const records = [1, 2].map((id) => stage.fake.publish({ id }));
    await stage.run(() => undefined, { mode: "fetch" });
    const acked = records.map(({ settlements }) => settlements);
    assert.deepEqual(acked, Array(2).fill([{ action: "ack", attempt: 1 }]));
    assert.deepEqual(stage.told, ["retry", "acked", "acked"]);
  }));

test("a worker refuses options that are out of range", () =>
  Stage.with(async ({ fake: { client } }) => {
    const wrong: object[] = [
      { concurrency: 0 },
      { concurrency: 1_001 },
      { concurrency: 1.5 },
      { mode: "push" },
      { mode: "fetch", batch: 0 },
      { maxWait: 300_001 },
      { lease: 999 },
      { lease: 0 },
      { grace: 999 },
      { grace: 180_001 },
      { maxBytes: 1_023 },
      { atMost: 999 },
      { atMost: Infinity },
      { stopTimeout: -1 },
      { decode: "xml" },
      { name: "x".repeat(1_025) },
    ];
    for (const options of wrong)
      assert.throws(
        () => new Worker(client, "TASKS", "worker", () => undefined, options),
        /must be|more than 1 KiB/,
        JSON.stringify(options),
      );
    assert.throws(() => new Worker(client, "", "worker", () => undefined), /must have a name/);
  }));

test("a worker runs once", () =>
  Stage.with(async (stage) => {
    const worker = stage.worker(() => undefined);
    worker.stop();
    await worker.run();
    await assert.rejects(worker.run(), /runs once/);
  }));

test("with signals, SIGTERM stops a worker", () =>
  Stage.with(async (stage) => {
    const running = stage.worker(() => undefined).run({ signals: true });
    await stage.seen("ready");
    process.kill(process.pid, "SIGTERM");
    await running;
    assert.equal(process.listenerCount("SIGTERM"), 0);
  }));
