package io.fetchproxy.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.ForwardingClientCall.SimpleForwardingClientCall;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.TlsChannelCredentials;
import io.grpc.util.AdvancedTlsX509KeyManager;
import io.grpc.util.AdvancedTlsX509TrustManager;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.BasicFileAttributes;
import java.security.GeneralSecurityException;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.TimeUnit;

/** The channel to the proxy, and its credentials. It must know nothing of calls. */
final class Connection {
  /** The largest answer to ask for. The received answer may be a little larger. */
  static final int MAX_BYTES = 16 << 20;

  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  /** The addresses to which a token may be sent: nobody on the way can read it. */
  private static final String PROTECTED =
      "(https:|(dns:///)?(localhost|127\\.0\\.0\\.1|\\[::1]):).*";

  private Connection() {}

  /** Opens a channel. A file that is null is not used. */
  static ManagedChannel open(String address, Path ca, Path cert, Path key, Path bearer)
      throws IOException, GeneralSecurityException {
    if (bearer != null && !address.matches(PROTECTED)) {
      throw new IllegalArgumentException(
          "a credential is not sent to " + address + " without TLS: use https://");
    }
    if ((cert == null) != (key == null)) {
      throw new IllegalArgumentException("cert and key need each other");
    }
    var files = new Credentials();
    if (bearer != null) files.watch(() -> files.bearer = Files.readString(bearer).strip(), bearer);
    boolean hasTls = address.startsWith("https://");
    var credentials = hasTls ? tls(files, ca, cert, key) : InsecureChannelCredentials.create();
    return Grpc.newChannelBuilder(address.replace("https://", ""), credentials)
        .defaultLoadBalancingPolicy("round_robin")
        .maxInboundMessageSize(MAX_BYTES + (1 << 20))
        .keepAliveTime(30, TimeUnit.SECONDS)
        .keepAliveWithoutCalls(true)
        .intercept(files)
        .build();
  }

  private static ChannelCredentials tls(Credentials files, Path ca, Path cert, Path key)
      throws IOException, GeneralSecurityException {
    var tls = TlsChannelCredentials.newBuilder();
    if (ca != null) {
      var authorities = AdvancedTlsX509TrustManager.newBuilder().build();
      files.watch(() -> authorities.updateTrustCredentials(ca.toFile()), ca);
      tls.trustManager(authorities);
    }
    if (cert != null) {
      var identity = new AdvancedTlsX509KeyManager();
      files.watch(() -> identity.updateIdentityCredentials(cert.toFile(), key.toFile()), cert, key);
      tls.keyManager(identity);
    }
    return tls.build();
  }

  /** Reads files again, before a call, if they have changed. */
  private static final class Credentials implements ClientInterceptor {
    private final List<Watched> watched = new ArrayList<>();
    private volatile String bearer;

    void watch(Reading reading, Path... paths) {
      watched.add(new Watched(reading, List.of(paths)));
    }

    private synchronized void refresh() {
      try {
        for (Watched one : watched) one.refresh();
      } catch (IOException | GeneralSecurityException error) {
        throw Status.UNAVAILABLE.withDescription(error.toString()).asRuntimeException();
      }
    }

    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(
        MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
      refresh();
      return new SimpleForwardingClientCall<>(next.newCall(method, options)) {
        @Override
        public void start(Listener<A> listener, Metadata headers) {
          if (bearer != null) headers.put(AUTHORIZATION, "Bearer " + bearer);
          super.start(listener, headers);
        }
      };
    }
  }

  private interface Reading {
    void read() throws IOException, GeneralSecurityException;
  }

  /** Files that are read together. */
  private static final class Watched {
    private final Reading reading;
    private final List<Path> paths;
    private List<Object> seen = List.of();

    Watched(Reading reading, List<Path> paths) {
      this.reading = reading;
      this.paths = paths;
    }

    void refresh() throws IOException, GeneralSecurityException {
      var now = new ArrayList<Object>();
      for (Path path : paths) {
        var attributes = Files.readAttributes(path, BasicFileAttributes.class);
        now.add(attributes.lastModifiedTime());
        now.add(attributes.size());
        now.add(String.valueOf(attributes.fileKey()));
      }
      if (now.equals(seen)) return;
      reading.read();
      seen = now;
    }
  }
}
