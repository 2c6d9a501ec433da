package io.fetchproxy.client.testing;

import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** What the fake accepts as JSON. */
final class JsonTest {
  @ParameterizedTest
  @ValueSource(
      strings = {
        "{}",
        " [ ] ",
        "0",
        "-1.5e+9",
        "null",
        "\"\"",
        "\"\\ud800\"",
        "{\"a\":{\"b\":[1,[2,{}]]}}",
        "[{},[],\"x\",true]",
        "{\"a\":1,\"a\":2}"
      })
  void jsonIsAccepted(String text) {
    assertTrue(Json.isValid(text), text);
  }

  @ParameterizedTest
  @ValueSource(
      strings = {
        "",
        " ",
        "{",
        "]",
        "[1,]",
        "[1 2]",
        "{\"a\"}",
        "{a:1}",
        "{\"a\":1,}",
        "01",
        "1.",
        "nul",
        "'x'",
        "\"\t\"",
        "\"\\x\"",
        "[] []",
        "{]",
        "[}",
        "{1:2}",
        ","
      })
  void anythingElseIsNot(String text) {
    assertFalse(Json.isValid(text), text);
  }

  @Test
  void depthHasNoLimit() {
    assertTrue(Json.isValid("[".repeat(100_000) + "]".repeat(100_000)));
    assertFalse(Json.isValid("[".repeat(100_000) + "]".repeat(99_999)));
    assertTrue(Json.isValid("\"" + "é".repeat(100_000) + "\""));
  }
}
