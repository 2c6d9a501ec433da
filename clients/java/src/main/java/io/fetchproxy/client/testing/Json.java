package io.fetchproxy.client.testing;

import java.util.ArrayDeque;
import java.util.Deque;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/** Whether a text is one JSON value, of any depth. */
final class Json {
  private static final Pattern SCALAR =
      Pattern.compile(
          "\"([^\"\\\\\\p{Cntrl}]|\\\\([\"\\\\/bfnrt]|u[0-9a-fA-F]{4}))*+\""
              + "|-?(0|[1-9][0-9]*+)(\\.[0-9]++)?([eE][-+]?[0-9]++)?"
              + "|true|false|null");

  private final String text;
  private final Deque<Character> open = new ArrayDeque<>(); // The brackets that are open.
  private int at;

  private Json(String text) {
    this.text = text;
  }

  static boolean isValid(String text) {
    return new Json(text).isValue();
  }

  private boolean isValue() {
    do {
      if (!begins() || !ends()) return false;
    } while (!open.isEmpty());
    skipSpace();
    return at == text.length();
  }

  /** Reads up to the end of a scalar, or of an empty object or array. */
  private boolean begins() {
    while (true) {
      if (next('{')) {
        if (next('}')) return true;
        open.push('}');
        if (!isName()) return false;
      } else if (next('[')) {
        if (next(']')) return true;
        open.push(']');
      } else {
        return isScalar();
      }
    }
  }

  /** Reads what may follow a value, up to the next value or the end of the text. */
  private boolean ends() {
    while (!open.isEmpty()) {
      if (next(',')) return open.peek() == ']' || isName();
      if (!next(open.peek())) return false;
      open.pop();
    }
    return true;
  }

  private boolean isName() {
    skipSpace();
    return at < text.length() && text.charAt(at) == '"' && isScalar() && next(':');
  }

  private boolean isScalar() {
    skipSpace();
    Matcher scalar = SCALAR.matcher(text).region(at, text.length());
    if (!scalar.lookingAt()) return false;
    at = scalar.end();
    return true;
  }

  private boolean next(char wanted) {
    skipSpace();
    if (at == text.length() || text.charAt(at) != wanted) return false;
    at++;
    return true;
  }

  private void skipSpace() {
    while (at < text.length() && " \t\n\r".indexOf(text.charAt(at)) >= 0) at++;
  }
}
