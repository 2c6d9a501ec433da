package io.fetchproxy.client.testing;

import com.google.protobuf.ByteString;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;

/** The record of a message that was published to the fake. */
public final class FakeMessage {
  final ByteString payload;
  final String subject;
  final Map<String, List<String>> headers;
  final Instant published = Instant.now();
  private final FakeQueue queue;
  private final long sequence;
  // The lock of the queue guards all that follows.
  final List<Settlement> settled = new ArrayList<>();
  int delivered;
  boolean ended;

  FakeMessage(
      FakeQueue queue,
      long sequence,
      ByteString payload,
      String subject,
      Map<String, List<String>> headers) {
    this.queue = queue;
    this.sequence = sequence;
    this.payload = payload;
    this.subject = subject;
    this.headers = headers;
  }

  /**
   * Returns the number of the message in the stream.
   *
   * @return a number from 1
   */
  public long sequence() {
    return sequence;
  }

  /**
   * Returns how often the message was delivered.
   *
   * @return 0 before the first delivery
   */
  public int attempts() {
    synchronized (queue) {
      return delivered;
    }
  }

  /**
   * Returns how the message was settled.
   *
   * @return a settlement for each attempt that was settled, in order
   */
  public List<Settlement> settlements() {
    synchronized (queue) {
      return List.copyOf(settled);
    }
  }
}
