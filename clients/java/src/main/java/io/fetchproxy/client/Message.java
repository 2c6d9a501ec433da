package io.fetchproxy.client;

import io.fetchproxy.v1.Delivery;
import java.time.Instant;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/**
 * One attempt to deliver a message.
 *
 * @param <T> the decoded payload
 */
public final class Message<T> {
  private final Delivery delivery;
  private final T data;

  Message(Delivery delivery, T data) {
    this.delivery = delivery;
    this.data = data;
  }

  /**
   * Returns the decoded payload.
   *
   * @return null for a message without payload, such as a tombstone of a key-value bucket; in an
   *     event also null if the payload was not decoded
   */
  public T data() {
    return data;
  }

  /**
   * Returns the payload.
   *
   * @return a copy of its bytes
   */
  public byte[] payload() {
    return Decoder.payload(delivery).toByteArray();
  }

  /**
   * Returns the subject under which the stream stores the message.
   *
   * @return the subject
   */
  public String subject() {
    return delivery.getSubject();
  }

  /**
   * Returns the headers.
   *
   * @return each name with all its values, in order
   */
  public Map<String, List<String>> headers() {
    var headers = new TreeMap<String, List<String>>();
    delivery
        .getHeadersMap()
        .forEach((name, values) -> headers.put(name, List.copyOf(values.getValuesList())));
    return headers;
  }

  /**
   * Returns the number of the message in its stream.
   *
   * @return a number from 1
   */
  public long streamSequence() {
    return delivery.getStreamSequence();
  }

  /**
   * Returns the number of this attempt.
   *
   * @return a number from 1
   */
  public int deliveryCount() {
    return delivery.getDeliveryCount();
  }

  /**
   * Returns the number of attempts after which JetStream gives the message up.
   *
   * @return 0 for no limit
   */
  public int maxDeliver() {
    return delivery.getMaxDeliver();
  }

  /**
   * Returns the time when the stream stored the message, by the clock of the NATS server.
   *
   * @return the time
   */
  public Instant timestamp() {
    return Times.of(delivery.getPublishTime());
  }

  /**
   * Returns the token, for a call of your own.
   *
   * @return the token, which the client takes
   */
  public String token() {
    return delivery.getToken();
  }

  /** Whether a Nak would be the end of the message. */
  boolean isLastAttempt() {
    return maxDeliver() > 0 && deliveryCount() >= maxDeliver();
  }
}
