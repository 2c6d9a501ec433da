// The messages that a handler and an event get, and how their payloads are decoded. Settles nothing.

import {
  Codec,
  RejectedCause,
  type Delivery,
  type HeaderValues,
  type Rejected,
} from "./gen/fetchproxy/v1/fetch.js";

/** Each name has all its values, in order. Names are as published, with upper and lower case. */
export type Headers = ReadonlyMap<string, readonly string[]>;

/** A message, leased to this worker. `T` is the type of its decoded payload. */
export class Message<T = unknown> {
  /** The decoded payload. Undefined for a message without payload, such as a tombstone. */
  readonly data!: T;
  /** The subject under which the stream stores the message. */
  readonly subject: string;
  readonly headers: Headers;
  /** The number of the message in its stream, from 1. */
  readonly streamSequence: number;
  /** The number of this attempt, from 1. */
  readonly deliveryCount: number;
  /** The number of attempts after which JetStream gives the message up. 0: never. */
  readonly maxDeliver: number;
  /** When the stream stored the message. */
  readonly timestamp: Date;
  /** Settles the message by a call of your own. */
  readonly token: string;
  readonly #content: Delivery["payload"];

  /** @internal */
  constructor(delivery: Delivery) {
    this.subject = delivery.subject;
    this.headers = headersOf(delivery.headers);
    this.streamSequence = delivery.streamSequence;
    this.deliveryCount = delivery.deliveryCount;
    this.maxDeliver = delivery.maxDeliver;
    this.timestamp = delivery.publishTime ?? new Date(0);
    this.token = delivery.token;
    this.#content = delivery.payload;
  }

  /** The payload as published. */
  get payload(): Buffer {
    const content = this.#content;
    if (content?.$case === "text") return Buffer.from(content.value);
    return content?.value ?? Buffer.alloc(0);
  }

  /** The payload as text. @internal */
  get text(): string {
    const content = this.#content;
    return content?.$case === "text" ? content.value : this.payload.toString();
  }

  /** After this attempt there is no other: a Nak would end the message. @internal */
  get isLastAttempt(): boolean {
    return this.maxDeliver > 0 && this.deliveryCount >= this.maxDeliver;
  }

  /** False if the message is all headers. @internal */
  get hasPayload(): boolean {
    if (this.#content && this.#content.value.length > 0) return true;
    return !WITHOUT_PAYLOAD.some((header) => this.headers.has(header));
  }
}

/** The headers of messages that were published, or are delivered, without payload. */
const WITHOUT_PAYLOAD = ["Nats-Msg-Size", "Nats-Marker-Reason", "KV-Operation"];

/** A message that cannot be delivered as this worker asks. */
export interface RejectedMessage {
  /** `codec`: it is not JSON, or not UTF-8. `too_large`: it is larger than `maxBytes`. */
  readonly cause: "codec" | "too_large" | "unknown";
  /** The exact fault, as text for people. */
  readonly detail: string;
  /** Empty if not even the subject fits into an answer. */
  readonly subject: string;
  readonly streamSequence: number;
  readonly deliveryCount: number;
  /** The size of the payload, in bytes. */
  readonly size: number;
  /** The payload that failed the codec. Empty if the message is too large. */
  readonly payload: Buffer;
  /** Empty if the message is too large. */
  readonly headers: Headers;
  /** Settles the message. Empty: the proxy has terminated the message. */
  readonly token: string;
}

export function rejectedMessage(rejected: Rejected): RejectedMessage {
  const { detail, subject, streamSequence, deliveryCount, size, data: payload, token } = rejected;
  const [cause, headers] = [CAUSES[rejected.cause] ?? "unknown", headersOf(rejected.headers)];
  return { cause, detail, subject, streamSequence, deliveryCount, size, payload, headers, token };
}

const CAUSES: Record<number, RejectedMessage["cause"]> = {
  [RejectedCause.REJECTED_CAUSE_CODEC]: "codec",
  [RejectedCause.REJECTED_CAUSE_TOO_LARGE]: "too_large",
};

const NO_HEADERS: Headers = new Map();

function headersOf(headers: Map<string, HeaderValues>): Headers {
  if (headers.size === 0) return NO_HEADERS;
  return new Map([...headers].map(([name, { values }]) => [name, values]));
}

/**
 * Makes `data` out of a payload. `json` (the default), `text` and `bytes` are what they say. A function gets the
 * payload, and may be asynchronous. A schema is any object with the Standard Schema interface, such as a schema
 * of Zod: it checks the parsed JSON.
 */
export type Decode<T> =
  | "json"
  | "text"
  | "bytes"
  | ((payload: Buffer, message: Message<undefined>) => T | Promise<T>)
  | Schema<T>;

/** The part of the Standard Schema interface, version 1, that is used here. */
export interface Schema<T> {
  readonly "~standard": {
    validate(value: unknown): Validated<T> | Promise<Validated<T>>;
    readonly types?: { readonly output: T } | undefined;
  };
}

type Validated<T> =
  { readonly value: T; readonly issues?: undefined } | { readonly issues: readonly Issue[] };

interface Issue {
  readonly message: string;
  readonly path?: readonly (PropertyKey | { readonly key: PropertyKey })[] | undefined;
}

/** How a worker decodes: what the proxy checks, and what is left to do here. */
export interface Decoder {
  readonly codec: Codec;
  /** Fails if the payload is not as it must be. */
  decode(message: Message): unknown;
}

/** @throws TypeError */
export function decoderOf(decode: Decode<unknown>): Decoder {
  if (decode === "json")
    return { codec: Codec.CODEC_JSON, decode: (message) => JSON.parse(message.text) };
  if (decode === "text") return { codec: Codec.CODEC_TEXT, decode: (message) => message.text };
  if (decode === "bytes") return { codec: Codec.CODEC_RAW, decode: (message) => message.payload };
  // A schema of some libraries is a function, too.
  if ("~standard" in Object(decode)) {
    const schema = decode as Schema<unknown>;
    const check = (message: Message) => validated(schema, JSON.parse(message.text));
    return { codec: Codec.CODEC_JSON, decode: check };
  }
  if (typeof decode !== "function")
    throw new TypeError("decode must be json, text, bytes, a function or a schema");
  const made = (message: Message) => decode(message.payload, message as Message<undefined>);
  return { codec: Codec.CODEC_RAW, decode: made };
}

async function validated(schema: Schema<unknown>, value: unknown): Promise<unknown> {
  const result = await schema["~standard"].validate(value);
  if (!result.issues) return result.value;
  const told = result.issues.map(({ message, path = [] }) => {
    const keys = path.map((part) => String(typeof part === "object" ? part.key : part));
    return keys.length > 0 ? `${keys.join(".")}: ${message}` : message;
  });
  throw new Error(told.join("; "));
}
