{{- define "arcface.name" -}}
{{- /* Names of pods are labels, 63 characters at most. */ -}}
{{- $name := .Release.Name -}}
{{- if not (contains "arcface" $name) }}{{ $name = printf "%s-arcface" $name }}{{ end -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "arcface.selector" -}}
app.kubernetes.io/name: arcface
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "arcface.labels" -}}
{{ include "arcface.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "arcface.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.repository }}{{ trimSuffix "/" . }}/{{ end }}arcface-{{ .component }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- /* Addresses of all coordinators, as --join takes them: each pod has a name of its own in the headless service. */ -}}
{{- define "arcface.coordinators" -}}
{{- $name := include "arcface.name" . -}}
{{- $addresses := list -}}
{{- range $i := until (int .Values.coordinator.replicas) -}}
{{- $addresses = append $addresses (printf "%s-coordinator-%d.%s-coordinator:1234" $name $i $name) -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end }}

{{- define "arcface.etcdUrls" -}}
{{- $name := include "arcface.name" . -}}
{{- $urls := .Values.etcd.externalUrls -}}
{{- if .Values.etcd.enabled -}}
{{- $urls = list -}}
{{- range $i := until (int .Values.etcd.replicas) -}}
{{- $urls = append $urls (printf "http://%s-etcd-%d.%s-etcd:2379" $name $i $name) -}}
{{- end -}}
{{- end -}}
{{- join "," $urls -}}
{{- end }}

{{- define "arcface.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "arcface.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "arcface.placing" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Members of one kind on different nodes, if there are enough. */ -}}
{{- define "arcface.spread" -}}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- else }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "arcface.selector" . | nindent 14 }}
{{- end }}
{{- end }}

{{- define "arcface.dns" -}}
- to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: kube-system
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}
