// The outcomes of a handler, and the settlements that they become. Sends nothing.

import type { Settlement } from "./gen/fetchproxy/v1/fetch.js";
import type { WorkerEvent } from "./events.js";
import type { Message, RejectedMessage } from "./message.js";
import { duration } from "./time.js";

/** The proxy accepts no longer delay, in milliseconds. */
const LONGEST_DELAY = 24 * 3_600_000;
/** The proxy cuts a longer reason, in bytes. */
const LONGEST_REASON = 1_024;
/** The delay after the first failure of a handler, and the longest delay, in milliseconds. */
const [FIRST_DELAY, LAST_DELAY] = [5_000, 300_000];
/** The delay of a message that is too large for this worker, in milliseconds. */
const TOO_LARGE_DELAY = 60_000;

/** A handler throws or returns this if the message may succeed later. */
export class Nak extends Error {
  override readonly name = "Nak";

  /** The message comes back after `delay` milliseconds: 0 to 24 h, and a longer delay is lowered. */
  constructor(
    readonly delay = 0,
    message = `not now, again in ${delay} ms`,
  ) {
    super(message);
  }
}

/** A handler throws or returns this if the message can never succeed. The message does not come back. */
export class Term extends Error {
  override readonly name = "Term";

  /** JetStream publishes the reason in an advisory. It is cut to 1 KiB. */
  constructor(readonly reason: string) {
    super(reason);
  }
}

export type Action = NonNullable<Settlement["action"]>;

/** How a message is settled, and which event tells of it when that is confirmed. */
export interface Outcome {
  readonly action: Action;
  readonly event?: (message: Message) => WorkerEvent;
}

export const ACKED: Outcome = {
  action: { $case: "ack", value: {} },
  event: (message) => ({ name: "acked", message }),
};

export const RETURNED: Outcome = {
  action: nakAction(0),
  event: (message) => ({ name: "returned", message }),
};

export function nacked(delay: number): Outcome {
  const taken = delayOf(delay);
  return {
    action: nakAction(taken),
    event: (message) => ({ name: "nacked", message, delay: taken }),
  };
}

export function termed(reason: string): Outcome {
  const cut = reasonOf(reason);
  return {
    action: termAction(cut),
    event: (message) => ({ name: "termed", message, reason: cut }),
  };
}

/** After an error that a handler did not mean: longer with each attempt. */
export function failed({ deliveryCount }: Message): Outcome {
  return nacked(Math.min(FIRST_DELAY * 2 ** Math.min(deliveryCount - 1, 30), LAST_DELAY));
}

/** The outcome of a rejected message that is still leased. */
export function ofRejected({ cause, detail }: RejectedMessage): Outcome {
  // Another worker may accept larger messages.
  return { action: cause === "too_large" ? nakAction(TOO_LARGE_DELAY) : termAction(detail) };
}

export function nakAction(delay: number): Action {
  return { $case: "nak", value: { delay: duration(delayOf(delay)) } };
}

export function termAction(reason: string): Action {
  return { $case: "term", value: { reason: reasonOf(reason) } };
}

/** In milliseconds, as the proxy accepts it. */
export function delayOf(delay: number): number {
  return Math.min(Math.max(delay || 0, 0), LONGEST_DELAY);
}

/** Cut between two characters, as the proxy accepts it. */
export function reasonOf(reason: string): string {
  const { read } = new TextEncoder().encodeInto(reason, new Uint8Array(LONGEST_REASON));
  return reason.slice(0, read);
}
