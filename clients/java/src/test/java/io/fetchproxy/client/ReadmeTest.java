package io.fetchproxy.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.fetchproxy.client.testing.FakeProxy;
import java.io.StringWriter;
import java.net.URI;
import java.net.URL;
import java.net.URLClassLoader;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.FutureTask;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import javax.tools.JavaFileObject;
import javax.tools.SimpleJavaFileObject;
import javax.tools.ToolProvider;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;

/** The code of the README, compiled and run. */
@Timeout(60)
public final class ReadmeTest {
  /** What the worker of the README runs with, in place of the environment. */
  public static volatile Client client;

  @TempDir private Path folder;

  private static String block(int number) throws Exception {
    Matcher blocks =
        Pattern.compile("```java\n(.*?)```", Pattern.DOTALL)
            .matcher(Files.readString(Path.of("README.md")));
    for (int i = 0; i <= number; i++) assertTrue(blocks.find(), "block " + i);
    return blocks.group(1);
  }

  /** Runs the main method of a class. */
  private Void run(String code) throws Exception {
    var compiler = ToolProvider.getSystemJavaCompiler();
    var source =
        new SimpleJavaFileObject(URI.create("string:///Main.java"), JavaFileObject.Kind.SOURCE) {
          @Override
          public CharSequence getCharContent(boolean ignoresErrors) {
            return code;
          }
        };
    var said = new StringWriter();
    var options =
        List.of(
            "-Xlint:all", "-d", folder.toString(), "-cp", System.getProperty("java.class.path"));
    compiler.getTask(said, null, null, options, null, List.of(source)).call();
    assertEquals("", said.toString());
    try (var loader = new URLClassLoader(new URL[] {folder.toUri().toURL()})) {
      var main = loader.loadClass("Main").getMethod("main", String[].class);
      main.invoke(null, (Object) new String[0]);
    }
    return null;
  }

  @Test
  void workerOfTheReadmeWorks() throws Exception {
    String code = block(0);
    assertTrue(code.contains("Client.fromEnv()") && code.contains(".run()"));
    try (var fake = new FakeProxy()) {
      fake.publish("{}");
      fake.publish("{}");
      client = fake.client();
      var here = ReadmeTest.class.getName() + ".client";
      var main = new FutureTask<>(() -> run(code.replace("Client.fromEnv()", here)));
      var thread = new Thread(main);
      thread.start();
      while (fake.messages().stream().anyMatch(each -> each.settlements().isEmpty())) {
        if (main.isDone()) main.get();
        Thread.sleep(10);
      }
      thread.interrupt(); // Nothing else ends a worker without a signal.
      var ended = assertThrows(ExecutionException.class, main::get);
      assertTrue(ended.getCause().getCause() instanceof InterruptedException, ended.toString());
    }
  }

  @Test
  void testOfTheReadmePasses() throws Exception {
    var imports =
        """
        import static org.junit.jupiter.api.Assertions.assertEquals;
        import io.fetchproxy.client.Nak;
        import io.fetchproxy.client.Worker;
        import io.fetchproxy.client.testing.FakeProxy;
        import io.fetchproxy.client.testing.Settlement;
        import java.time.Duration;
        import java.util.List;
        public class Main {
          public static void main(String[] args) throws Exception {
        """;
    run(imports + block(1) + "}}");
  }
}
