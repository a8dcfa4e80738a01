#!/bin/bash
# up.sh: brings the cluster up from what build.sh left.  PROXY=none leaves kube-proxy out; NODES=2|3; CNI=ptp|bridge; DUAL=1 dual stack
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd); . "$HERE/env.sh"; DUAL=${DUAL:-0}; t0=$SECONDS; say() { echo "[$((SECONDS-t0))s] $*"; }
[ ! -e "$RUN/cp/apiserver.pid" ] || { echo "already up? run down.sh first"; exit 1; }
bash "$HERE/noderoot.sh" "$W"
mkdir -p "$RUN"/{cp/pki,cp/etcd,share}; printf 'NODES=%s\nP=%s\nDUAL=%s\nPROXY=%s\nCNI=%s\n' "$NODES" "$P" "$DUAL" "$PROXY" "$CNI" > "$RUN/state"
# --- network: a fabric namespace with a bridge (L2 of the nodes) that routes to the external client
ns() { ip netns add "$P-$1"; ip -n "$P-$1" link set lo up; }
ns fab; ns cp; ns ext
ip -n $P-fab link add br0 type bridge; ip -n $P-fab addr add $GW/24 dev br0; ip -n $P-fab addr add $NGW/24 dev br0; ip -n $P-fab addr add $GW6/64 dev br0 nodad; ip -n $P-fab link set br0 up
ip netns exec $P-fab sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.br0.send_redirects=0
ip netns exec $P-fab sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0 net.bridge.bridge-nf-call-arptables=0 2>/dev/null || true
attach() { # NS IP/PLEN IP6/PLEN GATEWAY
  ip -n $P-fab link add "v-$1" type veth peer name eth0 netns "$P-$1"; ip -n $P-fab link set "v-$1" master br0 up
  ip -n "$P-$1" addr add "$2" dev eth0; ip -n "$P-$1" addr add "$3" dev eth0 nodad; ip -n "$P-$1" link set eth0 up
  ip -n "$P-$1" route add default via "$4"; ip -n "$P-$1" -6 route add default via $GW6; }
attach cp $CP/24 $CP6/64 $GW
ip -n $P-fab link add v-ext type veth peer name eth0 netns $P-ext; ip -n $P-fab addr add 172.19.0.1/24 dev v-ext; ip -n $P-fab addr add fd00:19::1/64 dev v-ext nodad; ip -n $P-fab link set v-ext up
ip -n $P-ext addr add $EXT/24 dev eth0; ip -n $P-ext addr add fd00:19::2/64 dev eth0 nodad; ip -n $P-ext link set eth0 up; ip -n $P-ext route add default via 172.19.0.1; ip -n $P-ext -6 route add default via fd00:19::1
for n in $(seq $NODES); do ns n$n; attach n$n "$(NODEIP $n)/24" "$(NODEIP6 $n)/64" $NGW
  ip netns exec $P-n$n sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0
  ip netns exec $P-n$n sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1 2>/dev/null || true; done
for a in fab cp $(seq -f 'n%g' $NODES); do for n in $(seq $NODES); do [ $a = n$n ] || { [ $a = cp ] || ip -n $P-$a route add "$(POD4 $n).0/24" via "$(NODEIP $n)"; ip -n $P-$a -6 route add "$(POD6 $n):/64" via "$(NODEIP6 $n)"; }; done; done
# --- control plane, in $P-cp
cd "$RUN/cp/pki"
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 365 -subj /CN=test-ca 2>/dev/null
openssl genrsa -out sa.key 2048 2>/dev/null; openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
crt() { openssl req -newkey rsa:2048 -nodes -keyout $1.key -out $1.csr -subj "$2" 2>/dev/null; openssl x509 -req -in $1.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out $1.crt 2>/dev/null -extfile <(printf '%s\n' "$3"); }
crt apiserver /CN=kube-apiserver "$(printf 'subjectAltName=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,IP:127.0.0.1,IP:10.96.0.1,IP:%s\nextendedKeyUsage=serverAuth' $CP)"
crt front /CN=front-proxy-client extendedKeyUsage=clientAuth
cd "$RUN/cp"; { echo 'admintoken,admin,admin-uid,"system:masters"'; echo 'proxytoken,system:kube-proxy,proxy-uid'; for n in $(seq $NODES); do echo "nodetoken$n,system:node:$P-node$n,node$n-uid,\"system:nodes\""; done; } > tokens.csv
mkkc() { printf 'apiVersion: v1\nkind: Config\nclusters: [{name: t, cluster: {server: "https://%s:%s", certificate-authority-data: %s}}]\nusers: [{name: a, user: {token: %s}}]\ncontexts: [{name: t, context: {cluster: t, user: a}}]\ncurrent-context: t\n' $CP $PORT "$(base64 -w0 < "$RUN/cp/pki/ca.crt")" "$1"; }
mkkc admintoken > kubeconfig
SVC=10.96.0.0/16; CC=10.244.0.0/16; FG=EndpointSliceNodeName=true,EndpointSliceTerminatingCondition=true,IPv6DualStack=true; SVCX=$SVC,fd00:10:96::/112
[ "$DUAL" = 0 ] || CC=$CC,fd00:10:244::/56
bg() { local n=$1; shift; setsid nsenter --net=/run/netns/$P-cp "$@" > "$n.log" 2>&1 < /dev/null & echo $! > "$n.pid"; }
bg etcd "$W/bin/etcd" --name t --data-dir "$PWD/etcd" --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 \
  --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster t=http://127.0.0.1:2380 --unsafe-no-fsync --quota-backend-bytes=4000000000 --auto-compaction-retention=10m
bg apiserver "$W/bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 --bind-address=$CP --advertise-address=$CP --secure-port=$PORT --tls-cert-file=pki/apiserver.crt --tls-private-key-file=pki/apiserver.key \
  --client-ca-file=pki/ca.crt --token-auth-file=tokens.csv --service-account-issuer=https://kubernetes.default.svc.cluster.local --service-account-key-file=pki/sa.pub --service-account-signing-key-file=pki/sa.key \
  --authorization-mode=Node,RBAC --allow-privileged=true --storage-media-type=application/json --runtime-config=api/all=true --service-cluster-ip-range=$SVCX --feature-gates=$FG \
  --requestheader-client-ca-file=pki/ca.crt --requestheader-allowed-names=front-proxy-client --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group --requestheader-username-headers=X-Remote-User \
  --proxy-client-cert-file=pki/front.crt --proxy-client-key-file=pki/front.key --kubelet-preferred-address-types=InternalIP --max-requests-inflight=1000
for _ in $(seq 300); do [ "$(nsenter --net=/run/netns/$P-cp curl -s --cacert pki/ca.crt -H 'Authorization: Bearer admintoken' https://$CP:$PORT/readyz)" = ok ] && break; sleep 0.2; done; say "apiserver ready"
bg kcm "$W/bin/kube-controller-manager" --kubeconfig=kubeconfig --kube-api-content-type=application/json --leader-elect=false --port=0 --secure-port=0 --feature-gates=$FG --service-account-private-key-file=pki/sa.key --root-ca-file=pki/ca.crt \
  --cluster-signing-cert-file=pki/ca.crt --cluster-signing-key-file=pki/ca.key --controllers='*,bootstrapsigner,tokencleaner' --allocate-node-cidrs=false --node-monitor-grace-period=40s --terminated-pod-gc-threshold=200
bg sched "$W/bin/kube-scheduler" --kubeconfig=kubeconfig --leader-elect=false --port=0 --secure-port=0 --feature-gates=IPv6DualStack=true
# a web server at the external client's address, also what "google.com" is for e2e.test (its tests ask for it first)
( setsid nsenter --net=/run/netns/$P-ext "$W/bin/agnhost" netexec --http-port=80 --udp-port=8081 > ext.log 2>&1 < /dev/null & echo $! > ext.pid )
ip netns exec $P-fab sysctl -qw net.ipv4.fib_multipath_hash_policy=1
bg fakelb python3 "$HERE/fakelb.py" https://$CP:$PORT pki/ca.crt admintoken $P
# --- nodes
for n in $(seq $NODES); do D="$RUN/node$n"; mkdir -p "$D"/{upper,work,merged,containerd,kubelet,cni,log,etc}; NAME=$P-node$n
  mkkc nodetoken$n > "$D/etc/kubeconfig"; mkkc proxytoken > "$D/etc/proxy.kubeconfig"; cp pki/ca.crt "$D/etc/ca.crt"; echo "$PROXY" > "$D/etc/proxy"
  if [ "$DUAL" = 0 ]; then NODEIP $n; else echo "$(NODEIP $n),$(NODEIP6 $n)"; fi > "$D/etc/node-ip"
  R='[{"subnet":"'$(POD4 $n)'.0/24"}]'; RT='[{"dst":"0.0.0.0/0"}]'; [ "$DUAL" = 0 ] || { R+=',[{"subnet":"'$(POD6 $n)':/64"}]'; RT='[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]'; }
  T='"type":"ptp"'; [ "$CNI" = ptp ] || T='"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true'
  echo '{"cniVersion":"0.3.1","name":"'$P'","plugins":[{'$T',"ipMasq":false,"mtu":1500,"ipam":{"type":"host-local","dataDir":"/run/cni-ipam","ranges":['$R'],"routes":'$RT'}},{"type":"portmap","capabilities":{"portMappings":true}}]}' > "$D/cni.conflist"
  cat > "$D/containerd.toml" <<T
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "k8s.gcr.io/pause:3.2"
  restrict_oom_score_adj = true
  enable_unprivileged_ports = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
T
  cat > "$D/etc/kubelet.yaml" <<T
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}, x509: {clientCAFile: /etc/kubernetes/ca.crt}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
clusterDNS: [$DNSIP]
clusterDomain: cluster.local
failSwapOn: false
resolvConf: /etc/resolv.conf
contentType: application/json
evictionHard: {memory.available: "50Mi", nodefs.available: "1%", imagefs.available: "1%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
maxPods: 110
maxOpenFiles: 20000
systemReserved: {}
kubeAPIQPS: 50
kubeAPIBurst: 100
serializeImagePulls: false
nodeStatusUpdateFrequency: 5s
featureGates: {IPv6DualStack: $([ "$DUAL" = 0 ] && echo false || echo true)}
T
  cat > "$D/etc/kube-proxy.yaml" <<T
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: /etc/kubernetes/proxy.kubeconfig, contentType: application/json}
mode: ${PROXYMODE:-iptables}
clusterCIDR: $CC
conntrack: {maxPerCore: 0, min: 0}
featureGates: {EndpointSliceProxying: true, IPv6DualStack: $([ "$DUAL" = 0 ] && echo false || echo true)}
iptables: {minSyncPeriod: 0s, syncPeriod: 30s}
T
  # each hierarchy gets a subtree per node; the node's first process starts inside it
  for c in /sys/fs/cgroup/*/; do mkdir -p "$c$P-node$n"; done
  cat /sys/fs/cgroup/cpuset/cpuset.cpus > /sys/fs/cgroup/cpuset/$P-node$n/cpuset.cpus; cat /sys/fs/cgroup/cpuset/cpuset.mems > /sys/fs/cgroup/cpuset/$P-node$n/cpuset.mems
  echo 1 > /sys/fs/cgroup/memory/$P-node$n/memory.use_hierarchy 2>/dev/null || true
  ( for c in /sys/fs/cgroup/*/; do echo $BASHPID > "$c$P-node$n/cgroup.procs"; done
    exec setsid nsenter --net=/run/netns/$P-n$n unshare --mount --uts --ipc --pid --cgroup --fork --kill-child bash "$HERE/node-init.sh" $n > "$D/init.log" 2>&1 < /dev/null ) &
  echo $! > "$D/launcher.pid"
done
for n in $(seq $NODES); do for _ in $(seq 100); do p=$(cat /proc/$(cat "$RUN/node$n/launcher.pid")/task/*/children 2>/dev/null | tr -d ' '); [ -n "$p" ] && break; sleep 0.1; done; echo "$p" > "$RUN/node$n/pid"; done
for n in $(seq $NODES); do for _ in $(seq 300); do k get node $P-node$n >/dev/null 2>&1 && break; sleep 0.5; done
  C='"'$(POD4 $n).0/24'"'; [ "$DUAL" = 0 ] || C+=',"'$(POD6 $n):/64'"'
  k patch node $P-node$n -p '{"spec":{"podCIDR":"'$(POD4 $n).0/24'","podCIDRs":['$C']}}' >/dev/null; done; say "nodes registered"
k wait --for=condition=Ready node --all --timeout=120s; say "nodes ready"
sed "s/DNSIP/$DNSIP/" "$HERE/kubedns.yaml" | k apply -f - ; [ "$PROXY" = none ] || k -n kube-system rollout status deploy/coredns --timeout=120s || true   # without a proxy the DNS pods wait for one
say up
