// The end of a worker, as it is asked for: first politely, then by force. Settles nothing.

export class Stop {
  readonly #first = new AbortController();
  readonly #second = new AbortController();
  #timer?: NodeJS.Timeout;

  /** `timeout` is how long handlers may continue, in milliseconds. Undefined: until they end. */
  constructor(private readonly timeout?: number) {}

  /** Aborts when no more messages are wanted. */
  get asked(): AbortSignal {
    return this.#first.signal;
  }

  /** Aborts when handlers may not continue. */
  get forced(): AbortSignal {
    return this.#second.signal;
  }

  /** The second time, handlers may not continue. */
  ask(): void {
    if (this.asked.aborted) return this.#second.abort();
    this.#first.abort();
    if (this.timeout !== undefined)
      this.#timer = setTimeout(() => this.#second.abort(), this.timeout);
  }

  /** The worker has ended. */
  over(): void {
    clearTimeout(this.#timer);
  }
}
