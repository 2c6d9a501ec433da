// Durations of the contract, in milliseconds, and waits that can be ended. Owns no timer of a message.

import { setImmediate as breathe, setTimeout as sleep } from "node:timers/promises";

import type { Duration } from "./gen/google/protobuf/duration.js";

/** No timer of Node waits for longer. */
export const LONGEST_TIMER = 2 ** 31 - 1;

export function duration(millis: number): Duration {
  return { seconds: Math.floor(millis / 1_000), nanos: Math.floor((millis % 1_000) * 1e6) };
}

export function millis(duration: Duration | undefined): number {
  return duration ? duration.seconds * 1_000 + duration.nanos / 1e6 : 0;
}

/** Ends after `wait` milliseconds, or when `stop` aborts. */
export async function pause(wait: number, stop?: AbortSignal): Promise<void> {
  await sleep(Math.min(wait, LONGEST_TIMER), undefined, { signal: stop }).catch(() => undefined);
}

/**
 * A sleep that somebody else can end. A ring that nobody hears ends the next sleep. The sleeper hears all rings of a
 * turn of the event loop at once.
 */
export class Alarm {
  #rung = false;
  #wake?: () => void;

  ring(): void {
    this.#rung = true;
    this.#wake?.();
  }

  /** Ends after `wait` milliseconds, which may be infinite, or when it rings. */
  async sleep(wait: number): Promise<void> {
    if (!this.#rung) {
      await new Promise<void>((resolve) => {
        const timer = Number.isFinite(wait)
          ? setTimeout(resolve, Math.min(wait, LONGEST_TIMER))
          : undefined;
        this.#wake = () => {
          clearTimeout(timer);
          resolve();
        };
      });
      this.#wake = undefined;
    }
    await breathe();
    this.#rung = false;
  }
}
