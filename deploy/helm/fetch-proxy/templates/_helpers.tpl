{{- define "fetch-proxy.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /* The release's name, followed by the chart's name unless the release's name has it already. */ -}}
{{- define "fetch-proxy.fullname" -}}
{{- $name := include "fetch-proxy.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $full .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "fetch-proxy.selector" -}}
app.kubernetes.io/name: {{ include "fetch-proxy.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "fetch-proxy.testLabels" -}}
app.kubernetes.io/name: {{ include "fetch-proxy.name" . }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "fetch-proxy.labels" -}}
{{ include "fetch-proxy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "fetch-proxy.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "fetch-proxy.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "fetch-proxy.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* The Secret with the token keys. There is no default: replicas without a common key do not work
       together. */ -}}
{{- define "fetch-proxy.tokenKeys" -}}
{{- if and .Values.tokenKeys.secret .Values.tokenKeys.keys -}}
{{- fail "set tokenKeys.secret or tokenKeys.keys, not both" -}}
{{- else if .Values.tokenKeys.keys -}}
{{- printf "%s-token-keys" (include "fetch-proxy.fullname" .) -}}
{{- else -}}
{{- $how := "kubectl create secret generic fetch-proxy-token-keys --from-literal=token-keys=\"$(fetch-proxy keygen)\"" -}}
{{- required (printf "tokenKeys.secret is needed: the name of a Secret with the entry token-keys. To make one: %s" $how) .Values.tokenKeys.secret -}}
{{- end -}}
{{- end -}}

{{- /* The Secret with the certificate of the client port; empty if the port has no TLS. */ -}}
{{- define "fetch-proxy.tlsSecret" -}}
{{- with .Values.tls -}}
{{- if and .secret .certManager.enabled -}}
{{- fail "set tls.secret or tls.certManager.enabled, not both" -}}
{{- else if .certManager.enabled -}}
{{- $_ := required "tls.certManager.issuer.name is needed: the name of an Issuer or a ClusterIssuer" .certManager.issuer.name -}}
{{- printf "%s-tls" (include "fetch-proxy.fullname" $) -}}
{{- else if .secret -}}
{{- .secret -}}
{{- else if include "fetch-proxy.clientCA" $ -}}
{{- fail "tls.clientCASecret and tls.clientCAConfigMap need a certificate: set tls.secret or tls.certManager.enabled" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The object with the authorities of client certificates, in words; empty if there is none. */ -}}
{{- define "fetch-proxy.clientCA" -}}
{{- with .Values.tls -}}
{{- if and .clientCASecret .clientCAConfigMap -}}
{{- fail "set tls.clientCASecret or tls.clientCAConfigMap, not both" -}}
{{- else if .clientCASecret -}}
Secret {{ .clientCASecret }}
{{- else if .clientCAConfigMap -}}
ConfigMap {{ .clientCAConfigMap }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Whether a client without a certificate is refused; empty if it is not. */ -}}
{{- define "fetch-proxy.certified" -}}
{{- if and (include "fetch-proxy.clientCA" .) (eq .Values.tls.clientAuth "require") -}}yes{{- end -}}
{{- end -}}

{{- /* The source of the policy in a projected volume; empty if there is no policy. */ -}}
{{- define "fetch-proxy.policy" -}}
{{- with .Values.access -}}
{{- if gt (len (compact (list .policy .policyConfigMap .policySecret))) 1 -}}
{{- fail "set one of access.policy, access.policyConfigMap and access.policySecret" -}}
{{- else if .policy -}}
configMap: {name: {{ include "fetch-proxy.fullname" $ }}-policy}
{{- else if .policyConfigMap -}}
configMap: {name: {{ .policyConfigMap }}}
{{- else if .policySecret -}}
secret: {name: {{ .policySecret }}}
{{- else if or .apiKeysSecret .apiServer.enabled -}}
{{- fail "access.apiKeysSecret and access.apiServer need a policy: set access.policy, access.policyConfigMap or access.policySecret" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Refuses values that let strangers in without a word of admission. Renders nothing. */ -}}
{{- define "fetch-proxy.checkSecurity" -}}
{{- $certified := include "fetch-proxy.certified" . -}}
{{- $text := fromYaml .Values.access.policy -}}
{{- if hasKey $text "Error" -}}{{- fail (printf "access.policy is not YAML: %s" $text.Error) -}}{{- end -}}
{{- $anonymous := dig "authenticate" "anonymous" false $text -}}
{{- with .Values.security -}}
{{- if not (or .insecure (include "fetch-proxy.policy" $) $certified) -}}
{{- fail "callers would need no credential: set access.policy or tls.clientCASecret, or admit it by security.insecure=true" -}}
{{- else if and $anonymous (not (or .insecure $certified)) -}}
{{- fail "callers would need no credential: access.policy says `anonymous: true`; admit it by security.insecure=true" -}}
{{- else if not (or .insecure .plaintext (include "fetch-proxy.tlsSecret" $)) -}}
{{- fail "the port would have no TLS: set tls.secret or tls.certManager, or admit it by security.plaintext=true" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The Secret for NATS; empty if the method is none. */ -}}
{{- define "fetch-proxy.natsAuth" -}}
{{- with .Values.nats.auth -}}
{{- if and .secret .entries -}}
{{- fail "set nats.auth.secret or nats.auth.entries, not both" -}}
{{- else if eq .method "none" -}}
{{- if or .secret .entries -}}{{- fail "nats.auth.method is needed if nats.auth.secret or nats.auth.entries is set: creds, nkey, password or token" -}}{{- end -}}
{{- else if .entries -}}
{{- $needed := dict "creds" (list "nats.creds") "nkey" (list "nkey.seed") "password" (list "username" "password") "token" (list "token") -}}
{{- range get $needed .method -}}
{{- $_ := required (printf "nats.auth.entries.%s is needed for the method %s" . $.Values.nats.auth.method) (get $.Values.nats.auth.entries .) -}}
{{- end -}}
{{- printf "%s-nats" (include "fetch-proxy.fullname" $) -}}
{{- else -}}
{{- required (printf "nats.auth.secret is needed for the method %s" .method) .secret -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* An environment variable from an entry of a Secret: (list VARIABLE SECRET ENTRY). */ -}}
{{- define "fetch-proxy.fromSecret" -}}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 1 }}
      key: {{ index . 2 }}
{{- end -}}

{{- /* The port of the receiver of traces. */}}
{{- define "fetch-proxy.otelPort" -}}
{{- $url := urlParse .Values.otel.endpoint }}
{{- $named := regexFind ":[0-9]+$" $url.host | trimPrefix ":" }}
{{- $port := $named | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- .Values.otel.port | int | default ($port | int) }}
{{- end }}
