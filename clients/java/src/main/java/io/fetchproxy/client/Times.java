package io.fetchproxy.client;

import com.google.protobuf.Timestamp;
import java.time.Duration;
import java.time.Instant;
import java.util.concurrent.ThreadLocalRandom;

/** Times as the contract writes them, the clock, and the wait before a repeat. */
final class Times {
  /** The first wait before a call is repeated, in milliseconds. It doubles at each failure. */
  private static final long FIRST_WAIT = 100;

  /** The longest of these waits, and the longest wait that the proxy may ask for. */
  private static final long LONGEST_WAIT = 5_000;

  private Times() {}

  /** The time of a clock that never goes back, in milliseconds. */
  static long now() {
    return System.nanoTime() / 1_000_000;
  }

  static Duration of(com.google.protobuf.Duration duration) {
    return Duration.ofSeconds(duration.getSeconds(), duration.getNanos());
  }

  static Instant of(Timestamp time) {
    return Instant.ofEpochSecond(time.getSeconds(), time.getNanos());
  }

  static long millis(com.google.protobuf.Duration duration) {
    return of(duration).toMillis();
  }

  static com.google.protobuf.Duration duration(Duration duration) {
    return com.google.protobuf.Duration.newBuilder()
        .setSeconds(duration.getSeconds())
        .setNanos(duration.getNano())
        .build();
  }

  static com.google.protobuf.Duration duration(long millis) {
    return duration(Duration.ofMillis(millis));
  }

  static long clamp(long value, long least, long most) {
    return Math.max(least, Math.min(value, most));
  }

  /**
   * How long to wait before the call is repeated, in milliseconds. The wait is partly random,
   * because workers that failed together must not come back together.
   *
   * @param failed the number of failures before this failure
   */
  static long waitAfter(FetchProxyException error, int failed) {
    long most = Math.min(FIRST_WAIT << Math.min(failed, 6), LONGEST_WAIT);
    long asked = error.retryDelay().map(Duration::toMillis).orElse(0L);
    return Math.min(asked, LONGEST_WAIT)
        + most / 2
        + ThreadLocalRandom.current().nextLong(most / 2);
  }
}
