// A fake, a worker, and the events of the worker, for a test.

import assert from "node:assert/strict";
import { EventEmitter, once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";

import { Worker, type Handler, type WorkerEvent, type WorkerOptions } from "fetchproxy";
import { FakeProxy, type FakeOptions } from "fetchproxy/testing";

/** No test waits for longer, in milliseconds. */
export const BOUND = 10_000;

/** Both loops keep the same promises. */
export const MODES = ["consume", "fetch"] as const;

export class Stage {
  readonly events: WorkerEvent[] = [];
  readonly #news = new EventEmitter();

  private constructor(readonly fake: FakeProxy) {}

  /** Runs a test with a fake. A test that hangs fails. */
  static async with(play: (stage: Stage) => Promise<void>, options?: FakeOptions): Promise<void> {
    const fake = await FakeProxy.start(options);
    const late = new AbortController();
    try {
      const hangs = sleep(3 * BOUND, undefined, late).then(() => assert.fail("the test hangs"));
      await Promise.race([play(new Stage(fake)), hangs]);
    } finally {
      late.abort();
      await fake.close();
    }
  }

  worker<T = any>(handler: Handler<T>, options: WorkerOptions<T> = {}): Worker<T> {
    const onEvent = (event: WorkerEvent) => {
      this.events.push(event);
      this.#news.emit("news");
    };
    return new Worker(this.fake.client, "TASKS", "worker", handler, { onEvent, ...options });
  }

  /** Runs a worker until every message has ended. */
  async run<T = any>(handler: Handler<T>, options: WorkerOptions<T> = {}): Promise<void> {
    await this.fake.run(this.worker(handler, options));
  }

  /** The names of all events so far, without those of the worker itself. */
  get told(): string[] {
    const names = this.events.map(({ name }) => name as string);
    return names.filter((name) => !["ready", "stopped"].includes(name));
  }

  /** Waits until so many events of this name have come. */
  async seen<Name extends WorkerEvent["name"]>(
    name: Name,
    count = 1,
  ): Promise<Extract<WorkerEvent, { name: Name }>> {
    const signal = AbortSignal.timeout(BOUND);
    for (;;) {
      const found = this.events.filter((event) => event.name === name)[count - 1];
      if (found) return found as Extract<WorkerEvent, { name: Name }>;
      await once(this.#news, "news", { signal });
    }
  }
}

/** A promise, and what resolves it. */
export function gate(): { opened: Promise<void>; open: () => void } {
  let open = () => {};
  const opened = new Promise<void>((resolve) => (open = resolve));
  return { opened, open };
}
