{{/* The name of all objects of the release. */}}
{{- define "millrace.name" -}}
{{- if .Values.nameOverride -}}
{{ .Values.nameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains "millrace" .Release.Name -}}
{{ .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-millrace" .Release.Name | trunc 52 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "millrace.selector" -}}
app.kubernetes.io/name: millrace-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "millrace.labels" -}}
{{ include "millrace.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: millrace
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "millrace.gatewaySelector" -}}
app.kubernetes.io/name: millrace-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "millrace.gatewayLabels" -}}
{{ include "millrace.gatewaySelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: millrace
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "millrace.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "millrace.name" .) }}
{{- end -}}

{{/* The broker's addresses as the operator and, without natsServers, the workers reach it. */}}
{{- define "millrace.servers" -}}
{{- if .Values.nats.bundled.enabled -}}
{{ printf "nats://%s-nats.%s.svc:4222" (include "millrace.name" .) .Release.Namespace }}
{{- else if .Values.nats.servers -}}
{{ join "," .Values.nats.servers }}
{{- else -}}
{{ fail "nats.servers is empty: name the broker (nats.servers[0]=nats://HOST:4222), or set nats.bundled.enabled=true to try things out" }}
{{- end -}}
{{- end -}}
