// The events of a worker, their default log, and a function of the user that may fail.

import type { FetchProxyError } from "./errors.js";
import type { Message, RejectedMessage } from "./message.js";

/** All times are in milliseconds. */
export type WorkerEvent =
  /** The worker begins. */
  | { readonly name: "ready" }
  /** The proxy has confirmed the Ack. */
  | { readonly name: "acked"; readonly message: Message }
  /** The proxy has confirmed the Nak. */
  | { readonly name: "nacked"; readonly message: Message; readonly delay: number }
  /** The proxy has confirmed the Term. */
  | { readonly name: "termed"; readonly message: Message; readonly reason: string }
  /** The message was given back at a stop. */
  | { readonly name: "returned"; readonly message: Message }
  /** The message cannot be delivered to this worker. */
  | { readonly name: "rejected"; readonly rejected: RejectedMessage }
  /** The lease is lost, and the handler is cancelled. */
  | {
      readonly name: "lost";
      readonly message: Message;
      readonly reason: string;
      readonly error: FetchProxyError;
    }
  /** A call, or a part of a call, failed. It is repeated after `wait`. */
  | {
      readonly name: "retry";
      readonly reason: string;
      readonly detail: string;
      readonly wait: number;
      readonly error: FetchProxyError;
    }
  /** A handler failed with an error of its own. */
  | { readonly name: "handler_error"; readonly message: Message; readonly error: unknown }
  /** `run` ends without an error. */
  | { readonly name: "stopped" };

export type OnEvent = (event: WorkerEvent) => void;

/** The default: writes a line to the standard error output for each event that a person may have to look at. */
export function logEvent(event: WorkerEvent): void {
  const at = "message" in event ? `message ${event.message.streamSequence}` : "";
  switch (event.name) {
    case "rejected":
      return warn(`message ${event.rejected.streamSequence} is rejected: ${event.rejected.detail}`);
    case "termed":
      return warn(`${at} is terminated: ${event.reason}`);
    case "lost":
      return warn(`${at} is lost: ${event.error}`);
    case "retry":
      return warn(`again in ${Math.round(event.wait)} ms: ${event.error}`);
    case "handler_error":
      return console.warn(`fetchproxy: ${at}: the handler failed:`, event.error);
  }
}

/** The user's function, with its faults caught: it must not break a worker. */
export function guarded(onEvent: OnEvent): OnEvent {
  const failed = (error: unknown) => console.warn("fetchproxy: onEvent failed:", error);
  return (event) => {
    try {
      const result: unknown = onEvent(event);
      // An asynchronous function fits, too.
      if (result instanceof Promise) result.catch(failed);
    } catch (error) {
      failed(error);
    }
  };
}

function warn(text: string): void {
  console.warn(`fetchproxy: ${text}`);
}
