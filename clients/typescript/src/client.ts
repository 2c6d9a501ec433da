// The client: single calls, each with a deadline, and repeated while that may help.

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";

import { Connection, MAX_BYTES, type CredentialFiles } from "./connection.js";
import { errorOf, errorOfPart, PATIENCE, type FetchProxyError } from "./errors.js";
import {
  AckRequest,
  Codec,
  EmptyReason,
  ExtendRequest,
  FetchRequest,
  NakRequest,
  Outcome,
  SettleRequest,
  TermRequest,
} from "./gen/fetchproxy/v1/fetch.js";
import { Message, rejectedMessage, type RejectedMessage } from "./message.js";
import type { Duration } from "./gen/google/protobuf/duration.js";
import { delayOf, nakAction, reasonOf, termAction, type Action } from "./outcome.js";
import { duration, millis } from "./time.js";

/** The most tries of a call. */
const TRIES = 5;
/** The first wait before a repeat, in milliseconds. It is doubled each time. */
const FIRST_WAIT = 100;
/** The deadline of a settlement, in milliseconds. The proxy answers within 5 s. */
const SETTLE_LIMITS = { timeout: 10_000 };

export interface FetchOptions {
  /** The most messages: 1 to 1000. 1 unless set. */
  n?: number;
  /** The longest wait for a first message, in milliseconds: 0 to 5 min. 10 s unless set. */
  maxWait?: number;
  /** How long each message is leased, in milliseconds: 1 s or more. The ack wait of the consumer unless set. */
  lease?: number;
  /** The most bytes of the answer, 1 KiB to 16 MiB. 16 MiB unless set. */
  maxBytes?: number;
  /** Cancels the call. Messages that were leased to it are given back. */
  signal?: AbortSignal;
}

export interface Fetched {
  /** Each is leased to you. `data` is the payload. */
  readonly messages: Message<Buffer>[];
  readonly rejected: RejectedMessage[];
  /** Why there are no messages, such as `NO_MESSAGES`. "Errors" has all. Empty: there are messages. */
  readonly emptyReason: string;
  /** The number of messages that this consumer has not delivered yet. */
  readonly pending: number;
  /** The number of messages that are delivered and not settled. 0 if the proxy does not tell. */
  readonly ackPending: number;
  /** The name of this Fetch, for `giveBack`. */
  readonly attemptId: string;
}

/** The settlement of a message. Times are in milliseconds. */
export type Settlement = { readonly token: string } & (
  | { readonly action: "ack" }
  | { readonly action: "nak"; readonly delay?: number }
  | { readonly action: "term"; readonly reason?: string }
  | { readonly action: "extend"; readonly lease?: number }
);

/** The effect of a settlement: see `Outcome` in the contract. */
export type Effect = "confirmed" | "sent" | "duplicate" | "extended";

/** One channel to one proxy, or to all replicas of a name. Many workers may share it. */
export class Client {
  /** @internal */
  readonly connection: Connection;

  /**
   * The address is `host:port`, `https://host:port` with TLS, or `dns:///name:port` for all replicas of a name.
   * No call is made yet.
   *
   * @throws Error if a bearer would be sent to another machine without TLS.
   */
  constructor(
    readonly address: string,
    files: CredentialFiles = {},
  ) {
    this.connection = new Connection(address, files);
  }

  /**
   * Reads `FETCH_PROXY_ADDR` (127.0.0.1:50051 unless set), `FETCH_PROXY_CA`, `FETCH_PROXY_CERT`, `FETCH_PROXY_KEY`
   * and `FETCH_PROXY_BEARER_FILE`.
   */
  static fromEnv(env: NodeJS.ProcessEnv = process.env): Client {
    return new Client(env.FETCH_PROXY_ADDR || "127.0.0.1:50051", {
      ca: env.FETCH_PROXY_CA,
      cert: env.FETCH_PROXY_CERT,
      key: env.FETCH_PROXY_KEY,
      bearerFile: env.FETCH_PROXY_BEARER_FILE,
    });
  }

  /** Takes up to `n` messages. An answer that is lost comes again. */
  async fetch(stream: string, consumer: string, options: FetchOptions = {}): Promise<Fetched> {
    const { n = 1, maxWait = 10_000, lease, maxBytes = MAX_BYTES, signal } = options;
    const attemptId = randomUUID();
    const request = FetchRequest.create({
      ...{ stream, consumer, n, maxBytes, attemptId },
      codec: Codec.CODEC_RAW,
      maxWait: duration(maxWait),
      lease: optionalDuration(lease),
    });
    const limits = { timeout: maxWait + PATIENCE, signal };
    try {
      const answer = await repeated(
        (tries) => this.connection.fetch({ ...request, attemptAgain: tries > 0 }, limits),
        signal,
      );
      const { pending, ackPending } = answer;
      const messages = answer.messages.map((delivery) => {
        const message = new Message<Buffer>(delivery);
        return message.hasPayload ? Object.assign(message, { data: message.payload }) : message;
      });
      const rejected = answer.rejected.map(rejectedMessage);
      const emptyReason = emptyReasonOf(answer.emptyReason);
      return { messages, rejected, emptyReason, pending, ackPending, attemptId };
    } catch (error) {
      // If this fails, the messages come back when their leases end.
      if (signal?.aborted) await this.giveBack(stream, consumer, attemptId).catch(() => 0);
      throw error;
    }
  }

  /** Settles or extends up to 1000 messages. The results are in the order of the settlements. A part may fail alone. */
  async settle(settlements: readonly Settlement[]): Promise<(Effect | FetchProxyError)[]> {
    const parts = settlements.map((one) => ({
      token: one.token,
      action: actionOf(one),
      number: 0,
    }));
    const request = SettleRequest.create({ settlements: parts });
    const { results } = await repeated(() => this.connection.settle(request, SETTLE_LIMITS));
    return results.map((result) => (result.error ? errorOfPart(result.error) : effectOf(result)));
  }

  /** The message is done. */
  async ack(token: string): Promise<Effect> {
    const request = AckRequest.create({ token });
    return effectOf(await repeated(() => this.connection.ack(request, SETTLE_LIMITS)));
  }

  /** The message is to be delivered again, after `delay` milliseconds: at most 24 h. */
  async nak(token: string, delay = 0): Promise<Effect> {
    const request = NakRequest.create({ token, delay: duration(delayOf(delay)) });
    return effectOf(await repeated(() => this.connection.nak(request, SETTLE_LIMITS)));
  }

  /** The message is never to be delivered again. The reason is cut to 1 KiB. */
  async term(token: string, reason = ""): Promise<Effect> {
    const request = TermRequest.create({ token, reason: reasonOf(reason) });
    return effectOf(await repeated(() => this.connection.term(request, SETTLE_LIMITS)));
  }

  /**
   * The lease is to last for `lease` milliseconds from now: unless set, as long as it was granted. The answer is
   * how long it lasts.
   */
  async extend(token: string, lease?: number): Promise<number> {
    const request = ExtendRequest.create({ token, lease: optionalDuration(lease) });
    const answer = await repeated(() => this.connection.extend(request, SETTLE_LIMITS));
    return millis(answer.lease);
  }

  /** Gives back all that a Fetch has leased. Its answer is the number of messages. */
  async giveBack(stream: string, consumer: string, attemptId: string): Promise<number> {
    const request = { stream, consumer, attemptId };
    const answer = await repeated(() => this.connection.giveBack(request, SETTLE_LIMITS));
    return answer.messages;
  }

  /** Calls that are open may end. */
  close(): void {
    this.connection.close();
  }
}

/** Waits between the tries: for as long as the proxy asks, and longer each time. */
async function repeated<Answer>(
  attempt: (tries: number) => Promise<Answer>,
  signal?: AbortSignal,
): Promise<Answer> {
  for (let tries = 0; ; tries++) {
    try {
      return await attempt(tries);
    } catch (failure) {
      const error = errorOf(failure);
      if (signal?.aborted || !error.canRepeat || tries + 1 === TRIES) throw error;
      await sleep((error.retryDelay ?? 0) + FIRST_WAIT * 2 ** tries, undefined, { signal });
    }
  }
}

function actionOf(settlement: Settlement): Action {
  switch (settlement.action) {
    case "ack":
      return { $case: "ack", value: {} };
    case "nak":
      return nakAction(settlement.delay ?? 0);
    case "term":
      return termAction(settlement.reason ?? "");
    case "extend":
      return { $case: "extend", value: { lease: optionalDuration(settlement.lease) } };
  }
}

function optionalDuration(length: number | undefined): Duration | undefined {
  return length === undefined ? undefined : duration(length);
}

function effectOf({ outcome }: { outcome: Outcome }): Effect {
  return EFFECTS[outcome] ?? "confirmed";
}

const EFFECTS: Record<number, Effect> = {
  [Outcome.OUTCOME_CONFIRMED]: "confirmed",
  [Outcome.OUTCOME_SENT]: "sent",
  [Outcome.OUTCOME_DUPLICATE]: "duplicate",
  [Outcome.OUTCOME_EXTENDED]: "extended",
};

function emptyReasonOf(reason: EmptyReason): string {
  const name = EmptyReason[reason] ?? String(reason);
  return reason === EmptyReason.EMPTY_REASON_UNSPECIFIED ? "" : name.replace("EMPTY_REASON_", "");
}
