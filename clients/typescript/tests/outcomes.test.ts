// The outcomes of a handler and of a payload, in both loops, against the fake.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Nak, Term, type Message } from "fetchproxy";
import { z } from "zod";

import { MODES, Stage } from "./stage.js";

for (const mode of MODES) {
  test(`${mode}: a handler that returns acks its message`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({ id: 7 }, "tasks.one", { Colour: ["red", "green"] });
      const seen: Message[] = [];
      await stage.run((message) => void seen.push(message), { mode });
      assert.deepEqual(record.settlements, [{ action: "ack", attempt: 1 }]);
      const [message] = seen;
      assert.deepEqual(message?.data, { id: 7 });
      assert.equal(message?.subject, "tasks.one");
      assert.deepEqual([...message!.headers], [["Colour", ["red", "green"]]]);
      assert.deepEqual([message?.streamSequence, message?.deliveryCount], [1, 1]);
      assert.equal(message?.payload.toString(), '{"id":7}');
      assert.equal(message?.timestamp.getTime(), record.timestamp.getTime());
      assert.deepEqual(
        stage.events.map(({ name }) => name),
        ["ready", "acked", "stopped"],
      );
    }));

  test(`${mode}: a message with a Nak comes back, and is counted`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish("{}");
      const handler = async ({ deliveryCount }: Message) => {
        if (deliveryCount === 1) throw new Nak(1_500);
        if (deliveryCount === 2) return new Nak(100 * 3_600_000);
      };
      await stage.run(handler, { mode });
      assert.deepEqual(record.settlements, [
        { action: "nak", attempt: 1, delay: 1_500 },
        { action: "nak", attempt: 2, delay: 24 * 3_600_000 },
        { action: "ack", attempt: 3 },
      ]);
      assert.equal((await stage.seen("nacked")).delay, 1_500);
    }));

  test(`${mode}: a Term ends a message with its reason, which is cut to 1 KiB`, () =>
    Stage.with(async (stage) => {
      const thrown = stage.fake.publish(1);
      const returned = stage.fake.publish(2);
      const handler = ({ data }: Message) => {
        if (data === 1) throw new Term("never");
        return new Term("ü".repeat(600));
      };
      await stage.run(handler, { mode });
      assert.deepEqual(thrown.settlements, [{ action: "term", attempt: 1, reason: "never" }]);
      assert.equal(returned.settlements[0]?.reason, "ü".repeat(512));
      assert.equal((await stage.seen("termed")).reason, "never");
    }));

  test(`${mode}: any other error is told of, and its message comes back later each time`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish({});
      const errors = [new Error("broken"), "a string"];
      const handler = async ({ deliveryCount }: Message) => {
        if (deliveryCount === 1) throw errors[0];
        if (deliveryCount === 2) return Promise.reject(errors[1]);
        if (deliveryCount < 9) throw new Error("still broken");
      };
      await stage.run(handler, { mode });
      const delays = record.settlements.map(({ delay }) => delay);
      const seconds = [5, 10, 20, 40, 80, 160, 300, 300];
      assert.deepEqual(delays, [...seconds.map((each) => each * 1_000), undefined]);
      const told = stage.events.flatMap((event) =>
        event.name === "handler_error" ? [event.error] : [],
      );
      assert.deepEqual(told.slice(0, 2), errors);
    }));

  test(`${mode}: the Nak of a last attempt ends the message`, () =>
    Stage.with(
      async (stage) => {
        const record = stage.fake.publish({});
        await stage.run(() => Promise.reject(new Nak()), { mode });
        assert.equal(record.attempts, 2);
      },
      { maxDeliver: 2 },
    ));

  test(`${mode}: a payload that cannot be decoded is terminated, and no handler sees it`, () =>
    Stage.with(async (stage) => {
      const bad = stage.fake.publish("x");
      const good = stage.fake.publish("7");
      const seen: number[] = [];
      const decode = async (payload: Buffer) => {
        const number = Number(payload.toString());
        if (Number.isNaN(number)) throw new Error("not a number");
        return number;
      };
      await stage.run<number>(({ data }) => void seen.push(data), { mode, decode });
      const reason = "the payload cannot be decoded: not a number";
      assert.deepEqual(bad.settlements, [{ action: "term", attempt: 1, reason }]);
      assert.deepEqual(good.settlements, [{ action: "ack", attempt: 1 }]);
      assert.deepEqual(seen, [7]);
    }));

  test(`${mode}: a schema checks a payload, and gives data its type`, () =>
    Stage.with(async (stage) => {
      const schema = z.object({ do: z.string(), times: z.number().default(1) });
      const bad = stage.fake.publish({ do: 5 });
      const good = stage.fake.publish({ do: "it" });
      const seen: z.output<typeof schema>[] = [];
      await stage.run(({ data }) => void seen.push(data), { mode, decode: schema });
      assert.match(bad.settlements[0]?.reason ?? "", /cannot be decoded: do: /);
      assert.deepEqual(good.settlements, [{ action: "ack", attempt: 1 }]);
      assert.deepEqual(seen, [{ do: "it", times: 1 }]);
    }));

  test(`${mode}: text and bytes are given as they are`, () =>
    Stage.with(async (stage) => {
      const bytes = Buffer.from([0, 255]);
      stage.fake.publish(bytes);
      const seen: unknown[] = [];
      await stage.run(({ data }) => void seen.push(data), { mode, decode: "bytes" });
      stage.fake.publish("grün");
      await stage.run(({ data }) => void seen.push(data), { mode, decode: "text" });
      assert.deepEqual(seen, [bytes, "grün"]);
    }));

  test(`${mode}: a payload that is not JSON is rejected, and the worker continues`, () =>
    Stage.with(async (stage) => {
      const bad = stage.fake.publish("{");
      const good = stage.fake.publish("{}");
      await stage.run(() => undefined, { mode });
      assert.equal(bad.settlements[0]?.action, "term");
      assert.equal(good.settlements[0]?.action, "ack");
      const { rejected } = await stage.seen("rejected");
      assert.deepEqual([rejected.cause, rejected.streamSequence], ["codec", 1]);
      assert.equal(rejected.payload.toString(), "{");
    }));

  test(`${mode}: a message that is too large gets a Nak of 60 s`, () =>
    Stage.with(
      async (stage) => {
        const record = stage.fake.publish("x".repeat(2_000));
        await stage.run(() => assert.fail("handled"), { mode, maxBytes: 1_024, decode: "text" });
        assert.deepEqual(record.settlements, [{ action: "nak", attempt: 1, delay: 60_000 }]);
        assert.equal((await stage.seen("rejected")).rejected.cause, "too_large");
      },
      { maxDeliver: 1 },
    ));

  test(`${mode}: a message without payload reaches the handler without data`, () =>
    Stage.with(async (stage) => {
      const record = stage.fake.publish("", "kv.key", { "KV-Operation": "DEL" });
      const seen: unknown[] = [];
      const decode = z.object({});
      await stage.run(({ data }) => void seen.push(data), { mode, decode });
      assert.deepEqual(seen, [undefined]);
      assert.equal(record.settlements[0]?.action, "ack");
    }));
}
