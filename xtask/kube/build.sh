LD="-s -w"; for p in k8s.io/kubernetes/vendor/k8s.io/component-base/version k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version; do
LD="$LD -X $p.gitVersion=v1.20.2 -X $p.gitMajor=1 -X $p.gitMinor=20 -X $p.gitTreeState=archive"; done
for w in ${WHAT:-kube-apiserver kube-controller-manager kube-proxy}; do go build -ldflags "$LD" -o "$OUTDIR/$w" ./cmd/$w; done
