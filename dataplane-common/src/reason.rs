//! Why a packet was dropped, or passed without what one might have expected: return value, metric label and
//! documentation in one. `COUNTERS` is a per-CPU array by this number.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// Every reason, in the order of `COUNTERS`.
            pub const ALL: &[Reason] = &[$(Reason::$name,)+];

            /// The reason of a number; `None`: nobody of this version gives it.
            pub fn from_number(number: u32) -> Option<Reason> {
                Self::ALL.get(number as usize).copied()
            }

            /// The label in metrics and on the command line.
            pub const fn label(self) -> &'static str {
                match self { $(Reason::$name => $label,)+ }
            }

            /// What it means, for people.
            pub const fn text(self) -> &'static str {
                match self { $(Reason::$name => concat!($($doc,)+),)+ }
            }
        }
    };
}

reasons! {
    /// Passed: the packet is shorter than its headers say.
    Truncated = "truncated",
    /// Passed: a header field contradicts another.
    Malformed = "malformed",
    /// Passed: more IPv6 extension headers than are followed.
    ExtensionHeaders = "extension-headers",
    /// Held: a fragment that came before its datagram's first one.
    FragmentHeld = "fragment-held",
    /// Sent on: a held fragment whose datagram's first one has come.
    FragmentReleased = "fragment-released",
    /// Dropped: a fragment whose datagram's first one was dropped or refused.
    FragmentDropped = "fragment-dropped",
    /// Dropped: a held fragment whose datagram's first one did not come in time.
    FragmentTimedOut = "fragment-timed-out",
    /// Dropped: a held fragment that gave way to another, because there was no room.
    FragmentEvicted = "fragment-evicted",
    /// Passed: a fragment that came before its datagram's first one, and no more are held of its source, its datagram or at all.
    FragmentLimit = "fragment-limit",
    /// Passed: a fragment that came before its datagram's first one, and is too large to be held.
    FragmentTooLarge = "fragment-too-large",
    /// Refused: the service has no endpoint (RST or ICMP unreachable sent; at a socket hook ECONNREFUSED).
    NoEndpoints = "no-endpoints",
    /// Refused: the endpoint that a pod's connected socket was given is gone (ICMP unreachable sent).
    EndpointGone = "endpoint-gone",
    /// Refused: the endpoint itself refused a connection, by RST or ICMP port unreachable: nothing listens at its port.
    BackendRefused = "backend-refused",
    /// Dropped: traffic policy Local and no endpoint here, or endpoints without room in the tables (at a socket hook EPERM).
    NoLocalEndpoints = "no-local-endpoints",
    /// Dropped: the client is in none of the service's source ranges.
    SourceRange = "source-range",
    /// Dropped: a refusal was due and the rate limit was reached.
    RefusalRateLimited = "refusal-rate-limited",
    /// Dropped: a service or backend index was out of range.
    BadIndex = "bad-index",
    /// Dropped: no free source port for translation towards this backend.
    SnatPortsExhausted = "snat-ports-exhausted",
    /// Dropped: no address of this node fits the device by which the packet would leave.
    NoSnatAddress = "no-snat-address",
    /// Dropped: a flow could not be remembered (the table refused the insert).
    FlowInsertFailed = "flow-insert-failed",
    /// Dropped: a late answer of a backend that is not the flow's any more.
    FlowSuperseded = "flow-superseded",
    /// Dropped: no route to the backend or back to the client.
    NoRoute = "no-route",
    /// Dropped: time to live ran out.
    TtlExceeded = "ttl-exceeded",
    /// Answered: larger than the path's MTU (fragmentation needed or packet too big sent).
    FragmentationNeeded = "fragmentation-needed",
    /// Judged: policies allow the flow; counted when it begins, and again when policies have changed.
    PolicyAllowed = "policy-allowed",
    /// Dropped: a policy denies the flow, or isolates the pod and no rule allows it.
    PolicyDenied = "policy-denied",
    /// Dropped: the pod is not known yet whose interface or address it is, nor its policies.
    PolicyUnknownPod = "policy-unknown-pod",
    /// Dropped: a pod with policies, and the packet does not tell what flow it belongs to.
    PolicyUnreadable = "policy-unreadable",
    /// Dropped: the tables of policies lack an entry that they refer to.
    PolicyBroken = "policy-broken",
    /// Judged: a policy that is a dry run would deny the packet, which was allowed.
    DryRunDenied = "dry-run-denied",
    /// Judged: a policy that is a dry run would allow the packet, which was denied.
    DryRunAllowed = "dry-run-allowed",
    /// Dropped: the packet could not be rewritten.
    RewriteFailed = "rewrite-failed",
    /// Dropped: a pod sent it whose address its source is not.
    SourceNotOwn = "source-not-own",
    /// Not told: what `monitor` would have shown of a packet, had there been room.
    EventMissed = "event-missed",
}

/// Elements of `COUNTERS`.
pub const REASONS: u32 = Reason::ALL.len() as u32;
