//! What becomes of a packet.

use crate::reason::Reason;

/// What is done with a packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To whoever comes next at this hook, and on.
    Pass,
    Drop,
    /// Into the pod behind a host-side interface.
    Pod,
    /// Into the host's stack, as if arrived at a device.
    Host,
    /// Out of a device, link-layer header written.
    Transmit,
    /// Out of a device; the kernel resolves the neighbour.
    Resolve,
    /// An answer made of the packet, back to where it came from.
    Answer,
    /// Not decided yet: no live entry speaks for the packet; it is for the service in `value`, or perhaps a first answer.
    Miss,
    /// Not decided yet: ICMP.
    Icmp,
    /// Not decided yet: not for a service, but perhaps of a socket that was given a backend.
    Given,
    /// Not decided yet: to be refused, for the [`Reason`] in `value`.
    Refuse,
    /// Not decided yet: to be answered, it is larger than the MTU in `value`.
    TooBig,
    /// Not decided yet, between the steps of a stage: the step has nothing to say.
    Next,
    /// Not decided yet, between the steps of a stage: to be translated by its new entry.
    Translate,
    /// Not decided yet: policies have changed since the flow was judged.
    Judge,
    /// Not decided yet: policies are to be asked about what would pass, with this value.
    Enforce,
    /// Not decided yet: a fragment, the datagram's first one if `value` is 0.
    Fragment,
}

/// The decision. Everything in the packet has been written when it is returned.
///
/// One word, the action in its lower half, because it is returned in a register: what a BPF function returns by
/// memory leaves its return register undefined, which the verifier may take for a leaked pointer.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Verdict(u64);

impl Verdict {
    /// Nothing to us.
    pub const PASS: Self = Self::to(Action::Pass, 0);
    /// Passed because it can't be read.
    pub(crate) const UNREADABLE: Self = Self::to(Action::Pass, 1);
    /// What was to be done is done, and policies have been asked.
    pub(crate) const ONWARD: Self = Self::to(Action::Pass, 2);
    pub const ANSWER: Self = Self::to(Action::Answer, 0);
    pub(crate) const NEXT: Self = Self::to(Action::Next, 0);
    pub(crate) const TRANSLATE: Self = Self::to(Action::Translate, 0);

    #[inline(always)]
    pub const fn drop(reason: Reason) -> Self {
        Self::to(Action::Drop, reason as u32)
    }

    #[inline(always)]
    pub(crate) const fn refuse(reason: Reason) -> Self {
        Self::to(Action::Refuse, reason as u32)
    }

    #[inline(always)]
    pub const fn to(action: Action, value: u32) -> Self {
        Self(action as u64 | (value as u64) << 32)
    }

    #[inline(always)]
    pub const fn action(self) -> Action {
        match self.0 as u32 {
            0 => Action::Pass,
            1 => Action::Drop,
            2 => Action::Pod,
            3 => Action::Host,
            4 => Action::Transmit,
            5 => Action::Resolve,
            6 => Action::Answer,
            7 => Action::Miss,
            8 => Action::Icmp,
            9 => Action::Given,
            10 => Action::Refuse,
            11 => Action::TooBig,
            12 => Action::Next,
            13 => Action::Translate,
            14 => Action::Judge,
            15 => Action::Enforce,
            _ => Action::Fragment,
        }
    }

    #[inline(always)]
    pub const fn to_raw(self) -> u64 {
        self.0
    }

    /// The verdict of [`Self::to_raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Whether no policy has been asked about a packet that goes on.
    #[inline(always)]
    pub(crate) const fn is_open(self) -> bool {
        self.0 == Self::PASS.0 || self.0 == Self::UNREADABLE.0
    }

    /// Whether another stage has to decide.
    #[inline(always)]
    pub(crate) const fn is_pending(self) -> bool {
        self.0 as u32 >= Action::Miss as u32
    }

    /// The device of `Pod`, `Host`, `Transmit` and `Resolve`; the [`Reason`] of `Drop`. Of `Pass` it says no more than what
    /// the datapath tells itself.
    #[inline(always)]
    pub const fn value(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl core::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.action() {
            Action::Drop => write!(f, "Drop({:?})", Reason::ALL.get(self.value() as usize)),
            action => write!(f, "{action:?}({})", self.value()),
        }
    }
}

/// The places where packets are seen.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Xdp,
    FromNetdev,
    ToNetdev,
    ToLo,
    FromPod,
    ToPod,
}

impl Hook {
    /// The hook of a number as it is cast from one.
    #[inline(always)]
    pub(crate) const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::Xdp,
            1 => Self::FromNetdev,
            2 => Self::ToNetdev,
            3 => Self::ToLo,
            4 => Self::FromPod,
            _ => Self::ToPod,
        }
    }
}
