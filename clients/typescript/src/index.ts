// The names of the package `fetchproxy`.

export { Client } from "./client.js";
export type { Effect, Fetched, FetchOptions, Settlement } from "./client.js";
export type { CredentialFiles } from "./connection.js";
export { FetchProxyError } from "./errors.js";
export { logEvent } from "./events.js";
export type { OnEvent, WorkerEvent } from "./events.js";
export type { Handler, Tracer } from "./held.js";
export { Message } from "./message.js";
export type { Decode, Headers, RejectedMessage, Schema } from "./message.js";
export { Nak, Term } from "./outcome.js";
export { Worker } from "./worker.js";
export type { WorkerOptions } from "./worker.js";
