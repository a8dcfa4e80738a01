{{- define "dataplane.name" -}}
{{- default "dataplane-agent" .Values.fullnameOverride -}}
{{- end }}

{{- define "dataplane.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dataplane.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name must be given when serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "dataplane.selector" -}}
app.kubernetes.io/name: dataplane
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "dataplane.labels" -}}
{{ include "dataplane.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "dataplane.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end }}

{{- /* What a scraper outside of the node can reach. */ -}}
{{- define "dataplane.metricsReachable" -}}
{{- if and .Values.metrics.enabled (not (has .Values.metrics.address (list "127.0.0.1" "[::1]"))) -}}true{{- end -}}
{{- end }}

{{- define "dataplane.needsReachableMetrics" -}}
{{- if not (include "dataplane.metricsReachable" .context) -}}
{{- fail (printf "%s needs metrics that can be reached: set metrics.enabled, and metrics.address to 0.0.0.0 or [::]" .what) -}}
{{- end -}}
{{- end }}

{{- define "dataplane.probe" -}}
httpGet:
  {{- if has .root.Values.health.address (list "127.0.0.1" "[::1]") }}
  host: {{ trimPrefix "[" .root.Values.health.address | trimSuffix "]" | quote }}
  {{- end }}
  path: {{ .path }}
  port: {{ .root.Values.health.port }}
periodSeconds: {{ .times.periodSeconds }}
failureThreshold: {{ .times.failureThreshold }}
timeoutSeconds: 3
{{- end }}

{{- /* The preflight looks with the eyes of the agent: the same settings, rights and folders. */ -}}
{{- define "dataplane.agentEnv" -}}
- name: DATAPLANE_NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: DATAPLANE_SOURCE
  value: kube
- name: DATAPLANE_CONFIG
  value: /etc/dataplane/config.yaml
{{- with .Values.apiServer.addresses }}
- name: DATAPLANE_APISERVER
  value: {{ join "," . | quote }}
{{- end }}
- name: DATAPLANE_BPFFS
  value: /sys/fs/bpf
{{- if .Values.host.cgroup2 }}
- name: DATAPLANE_CGROUP
  value: /host/cgroup2
{{- end }}
- name: DATAPLANE_SOCKET
  value: /run/dataplane/agent.sock
- name: DATAPLANE_HEALTH_ADDR
  value: "{{ .Values.health.address }}:{{ .Values.health.port }}"
- name: DATAPLANE_METRICS_BIND_ADDRESS
  value: {{ if .Values.metrics.enabled }}"{{ .Values.metrics.address }}:{{ .Values.metrics.port }}"{{ else }}"off"{{ end }}
{{- with .Values.extraEnv }}
{{- toYaml . | nindent 0 }}
{{- end }}
{{- end }}

{{- define "dataplane.agentSecurity" -}}
runAsUser: 0
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add: {{- concat (list "BPF" "NET_ADMIN" "PERFMON") .Values.securityContext.extraCapabilities | uniq | toYaml | nindent 4 }}
seccompProfile:
  type: {{ .Values.securityContext.seccompProfile }}
{{- end }}

{{- define "dataplane.agentMounts" -}}
- name: config
  mountPath: /etc/dataplane
  readOnly: true
- name: run
  mountPath: /run/dataplane
- name: bpffs
  mountPath: /sys/fs/bpf
{{- if .Values.host.cgroup2 }}
- name: cgroup2
  mountPath: /host/cgroup2
  readOnly: true
{{- end }}
{{- end }}

{{/* What the schema cannot say: values that do not go together. */}}
{{- define "dataplane.checked" -}}
{{- if and .Values.metrics.enabled (eq (int .Values.metrics.port) (int .Values.health.port)) -}}
{{- fail (printf "metrics.port and health.port are both %d" (int .Values.health.port)) -}}
{{- end -}}
{{- $snat := include "dataplane.ports" (dict "name" "snat-ports" "range" (default "61000-65535" (index .Values.config "snat-ports"))) | fromJson -}}
{{- $node := include "dataplane.ports" (dict "name" "node-ports" "range" (default "30000-32767" (index .Values.config "node-ports"))) | fromJson -}}
{{- if and (le $snat.min $node.max) (le $node.min $snat.max) -}}
{{- fail (printf "config.snat-ports %s and config.node-ports %s overlap" $snat.range $node.range) -}}
{{- end -}}
{{- if lt $snat.min 1024.0 -}}
{{- fail (printf "config.snat-ports %s begins below 1024, among the ports of the node's own services" $snat.range) -}}
{{- end -}}
{{- if eq .Values.host.run .Values.host.bpffs -}}
{{- fail (printf "host.run and host.bpffs are both %s" .Values.host.run) -}}
{{- end -}}
{{- if and (not .Values.host.cgroup2) (ne (index .Values.config "socket-lb") "off") -}}
{{- fail "host.cgroup2 is empty: the agent sees no cgroups, and needs config.socket-lb: off" -}}
{{- end -}}
{{- $given := list "DATAPLANE_NODE_NAME" "DATAPLANE_SOURCE" "DATAPLANE_CONFIG" "DATAPLANE_APISERVER" "DATAPLANE_BPFFS" "DATAPLANE_CGROUP" "DATAPLANE_SOCKET" "DATAPLANE_HEALTH_ADDR" "DATAPLANE_METRICS_BIND_ADDRESS" -}}
{{- range .Values.extraEnv -}}
{{- if has .name $given -}}
{{- fail (printf "extraEnv: %s is given already, by the chart's own values or another entry" .name) -}}
{{- end -}}
{{- $given = append $given .name -}}
{{- end -}}
{{- end -}}

{{/* A range of ports, its first and its last. */}}
{{- define "dataplane.ports" -}}
{{- $ends := splitList "-" .range -}}
{{- if gt (int (first $ends)) (int (last $ends)) -}}
{{- fail (printf "config.%s: %s ends before it begins" .name .range) -}}
{{- end -}}
{{- dict "range" .range "min" (int (first $ends)) "max" (int (last $ends)) | toJson -}}
{{- end -}}
