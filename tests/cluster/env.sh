# Read by the other scripts. W: what build.sh made. RUN: the running cluster's files. Both, and the rest, from the environment.
W=${W:-$(cd "$HERE/../.." && pwd)/.tools/cluster}; RUN=${RUN:-/tmp/dataplane-cluster}
NODES=${NODES:-3}; PROXY=${PROXY:-kube-proxy}   # PROXY=none: no kube-proxy
CNI=${CNI:-ptp}                          # ptp | bridge
P=${P:-kc}                               # prefix of network namespaces, cgroups and nodes
CP=172.18.0.2; GW=172.18.0.1; EXT=172.19.0.2; DNSIP=10.96.0.10; PORT=6443
# Nodes have other addresses than who asks them from outside: a test takes an address in 10.0.0.0/8 for the cluster's own.
NGW=10.18.0.1; NODEIP() { echo "10.18.0.$((10 + $1))"; }; POD4() { echo "10.244.$1"; }; POD6() { echo "fd00:10:244:$1:"; }
CP6=fd00:18::2; GW6=fd00:18::1; NODEIP6() { echo "fd00:18::1$1"; }
KUBECONFIG=$RUN/cp/kubeconfig
k() { nsenter --net=/run/netns/$P-cp "$W/bin/kubectl" --kubeconfig "$RUN/cp/kubeconfig" "$@"; }
