package io.fetchproxy.client;

import com.google.protobuf.ByteString;
import io.fetchproxy.v1.Codec;
import io.fetchproxy.v1.Delivery;

/**
 * Makes the {@code data} of a message out of its payload. If it fails, the message is terminated.
 *
 * @param <T> the decoded payload
 */
public final class Decoder<T> {
  /**
   * A step of decoding.
   *
   * @param <P> the payload, as text or as bytes
   * @param <T> the decoded payload
   */
  @FunctionalInterface
  public interface Parser<P, T> {
    /**
     * Decodes one payload.
     *
     * @param payload the payload
     * @return the decoded payload
     * @throws Exception if the payload cannot be decoded
     */
    T parse(P payload) throws Exception;
  }

  private final Codec codec;
  private final Parser<Delivery, T> parser;

  private Decoder(Codec codec, Parser<Delivery, T> parser) {
    this.codec = codec;
    this.parser = parser;
  }

  /**
   * Takes the payload as JSON text. The proxy terminates every payload that is not JSON.
   *
   * @return a decoder that gives the text
   */
  public static Decoder<String> json() {
    return json(text -> text);
  }

  /**
   * Parses JSON text, with a library of your choice. The proxy terminates every payload that is not
   * JSON.
   *
   * @param <T> the decoded payload
   * @param parser makes the object out of the text
   * @return a decoder that gives the object
   */
  public static <T> Decoder<T> json(Parser<String, T> parser) {
    return new Decoder<>(Codec.CODEC_JSON, delivery -> parser.parse(delivery.getText()));
  }

  /**
   * Takes the payload as text. The proxy terminates every payload that is not UTF-8.
   *
   * @return a decoder that gives the text
   */
  public static Decoder<String> text() {
    return text(text -> text);
  }

  /**
   * Parses text. The proxy terminates every payload that is not UTF-8.
   *
   * @param <T> the decoded payload
   * @param parser makes the object out of the text
   * @return a decoder that gives the object
   */
  public static <T> Decoder<T> text(Parser<String, T> parser) {
    return new Decoder<>(Codec.CODEC_TEXT, delivery -> parser.parse(delivery.getText()));
  }

  /**
   * Takes the payload as it is.
   *
   * @return a decoder that gives the bytes
   */
  public static Decoder<byte[]> bytes() {
    return bytes(bytes -> bytes);
  }

  /**
   * Parses bytes, for example of a protobuf message.
   *
   * @param <T> the decoded payload
   * @param parser makes the object out of the bytes
   * @return a decoder that gives the object
   */
  public static <T> Decoder<T> bytes(Parser<byte[], T> parser) {
    return new Decoder<>(
        Codec.CODEC_RAW, delivery -> parser.parse(delivery.getData().toByteArray()));
  }

  Codec codec() {
    return codec;
  }

  /** Null for a message without a payload. */
  T decode(Delivery delivery) throws Exception {
    return hasPayload(delivery) ? parser.parse(delivery) : null;
  }

  static ByteString payload(Delivery delivery) {
    return delivery.hasText() ? delivery.getTextBytes() : delivery.getData();
  }

  /** A payload that was never delivered has one of these headers. */
  private static boolean hasPayload(Delivery delivery) {
    return !payload(delivery).isEmpty()
        || !(delivery.containsHeaders("Nats-Msg-Size")
            || delivery.containsHeaders("Nats-Marker-Reason")
            || delivery.containsHeaders("KV-Operation"));
  }
}
