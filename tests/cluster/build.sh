#!/bin/bash
# build.sh [WORKDIR=/tmp/kube-cluster/w]: everything the cluster needs, from Debian 12's own packages and source packages:
# WORKDIR/bin   etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl e2e.test ginkgo
# WORKDIR/node  unpacked containerd, runc, CNI plugins (and the libraries they want)
# WORKDIR/images/*.tar  docker-archive images, no registry
# Steps are skipped when their result exists.  Needs: apt-get, gcc, python3.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd); W=${1:-/tmp/kube-cluster/w}; mkdir -p "$W"; W=$(cd "$W" && pwd)
mkdir -p "$W"/{bin,dl,tools,images,apt/lists/partial,apt/cache/archives/partial}
cd "$W/dl"; t0=$SECONDS; say() { echo "[$((SECONDS-t0))s] $*"; }
# 1. sources and packages -------------------------------------------------------------------------
awk '/^URIs:/{u=$2} /^Suites:/{s=$2} /^Signed-By:/{print "deb-src [signed-by=" $2 "] " u " " s " main"; exit}' /etc/apt/sources.list.d/debian.sources > "$W/apt/src.list"
APT=(-o Dir::Etc::sourcelist="$W/apt/src.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$W/apt/lists" -o Dir::Cache="$W/apt/cache" -o APT::Sandbox::User=root)
if ! ls kubernetes_*.orig.tar.* >/dev/null 2>&1; then
  apt-get -qq "${APT[@]}" update; apt-get -qq "${APT[@]}" source --download-only kubernetes
fi
if ! ls containerd_*.deb >/dev/null 2>&1; then
  apt-get -qq update
  apt-get -qq -o APT::Sandbox::User=root download golang-1.19-go golang-1.19-src etcd-server golang-github-modern-go-reflect2-dev \
    containerd runc containernetworking-plugins busybox-static socat libseccomp2
fi
[ -d "$W/go" ] || for d in golang-1.19-go_*.deb golang-1.19-src_*.deb; do dpkg -x "$d" "$W/go"; done
[ -x "$W/bin/etcd" ] || { dpkg -x etcd-server_*.deb "$W/etcd"; cp "$W/etcd/usr/bin/etcd" "$W/bin/"; }
[ -d "$W/node" ] || for d in containerd_*.deb runc_*.deb containernetworking-plugins_*.deb busybox-static_*.deb socat_*.deb libseccomp2_*.deb; do dpkg -x "$d" "$W/node"; done
say "packages here"
# 2. the source tree, GOPATH mode ------------------------------------------------------------------
K="$W/gopath/src/k8s.io/kubernetes"
export GOROOT="$W/go/usr/lib/go-1.19" GOPATH="$W/gopath" GOCACHE="$W/gocache" GO111MODULE=off GOFLAGS= GOPROXY=off CGO_ENABLED=0 GOTOOLCHAIN=local TOOLS="$W/tools" OUTDIR="$W/bin"
export PATH="$GOROOT/bin:$PATH"
if [ ! -e "$W/.tree" ]; then
  rm -rf "$K"; mkdir -p "$K"; tar xf kubernetes_*.orig.tar.* -C "$K" --strip-components=1
  # the vendored reflect2 1.0.1 corrupts memory when built with Go >= 1.18: take Debian's 1.0.2
  dpkg -x golang-github-modern-go-reflect2-dev_*.deb "$W/reflect2"; R=vendor/github.com/modern-go/reflect2
  rm -rf "$K/$R"; cp -r "$W/reflect2/usr/share/gocode/src/github.com/modern-go/reflect2" "$K/$R"
  [ -n "${VANILLA:-}" ] || python3 "$HERE/../../xtask/kube/backport.py" "$K"
  cd "$K"
  go build -o "$TOOLS/" ./vendor/k8s.io/code-generator/cmd/{deepcopy,conversion,defaulter}-gen ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
  bash -euo pipefail "$HERE/../../xtask/kube/gen.sh" > "$W/gen.log" 2>&1 || { tail -20 "$W/gen.log"; exit 1; }
  [ -s pkg/generated/openapi/zz_generated.openapi.go ]
  # the load balancer tests of service.go run on this cluster, too: fakelb.py is its "cloud"
  sed -i 's/SkipUnlessProviderIs("gce", "gke")/SkipUnlessProviderIs("gce", "gke", "skeleton")/; s/SkipUnlessProviderIs("gce", "gke", "aws")/SkipUnlessProviderIs("gce", "gke", "aws", "skeleton")/' test/e2e/network/service.go
  touch "$W/.tree"
fi
cd "$K"; say "tree ready"
# 3. binaries --------------------------------------------------------------------------------------
LD="-s -w"; for p in k8s.io/kubernetes/vendor/k8s.io/component-base/version k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version; do
LD="$LD -X $p.gitVersion=v1.20.2 -X $p.gitMajor=1 -X $p.gitMinor=20 -X $p.gitTreeState=archive"; done
B() { local out=$1; shift; [ -x "$W/bin/$out" ] || { go build -ldflags "$LD" -o "$W/bin/$out" "$@"; say "built $out"; }; }
for w in kubelet kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubectl; do B $w ./cmd/$w; done
B agnhost ./test/images/agnhost
B ginkgo ./vendor/github.com/onsi/ginkgo/ginkgo
B regression ./test/images/regression-issue-74839
mkdir -p cmd/kubedns-test && cp "$HERE/kubedns/main.go" cmd/kubedns-test/ && B kubedns ./cmd/kubedns-test
if [ ! -x "$W/bin/e2e.test" ]; then
  go build -o "$TOOLS/go-bindata" ./vendor/github.com/go-bindata/go-bindata/go-bindata
  [ -s test/e2e/generated/bindata.go ] || "$TOOLS/go-bindata" -nometadata -o test/e2e/generated/bindata.go -pkg generated -ignore .jpg -ignore .png -ignore .md -ignore 'BUILD(\.bazel)?' \
    test/conformance/testdata/... test/e2e/testing-manifests/... test/e2e_node/testing-manifests/... test/images/... test/fixtures/...
  go test -c -ldflags "$LD" -o "$W/bin/e2e.test" ./test/e2e; say "built e2e.test"
fi
[ -x "$W/bin/pause" ] || gcc -Os -static -s -DVERSION=kc -o "$W/bin/pause" build/pause/linux/pause.c; say "built pause"
[ -s "$W/images/agnhost.tar" ] && [ -s "$W/images/kubedns.tar" ] || bash "$HERE/images.sh" "$W"; say "images ready"
