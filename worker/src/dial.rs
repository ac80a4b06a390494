//! Which coordinator to try next, and when: the one that a standby named, else those that are known in turn; after
//! every round of them a wait, doubling, capped, and jittered so that a cluster does not come back in one instant.
//! Pure: the caller brings random numbers and waits.

use arcface_proto::redirect;
use std::time::Duration;

/// First wait.
const FIRST: Duration = Duration::from_millis(200);
/// Longest wait. A coordinator that is back is found within this time.
const LONGEST: Duration = Duration::from_secs(2);
/// Longest wait while a coordinator answers that it stands by: a leader will be there soon.
const LONGEST_ELECTION: Duration = Duration::from_millis(800);
/// Before the next address of a round.
const SOON: Duration = Duration::from_millis(20);

/// The coordinators of a cluster, as one connection tries them.
#[derive(Clone, Debug)]
pub struct Dial {
    addresses: Vec<String>,
    next: usize,
    /// What a standby said of the leader; tried once a round.
    named: Option<String>,
    followed: bool,
    /// Of this round: tries from the list, and whether one was answered by a standby.
    tried: usize,
    standby: bool,
    rounds: u32,
    attempts: u32,
}

impl Dial {
    /// `addresses` are `host:port`.
    pub fn new(addresses: Vec<String>) -> Self {
        Self {
            addresses,
            next: 0,
            named: None,
            followed: false,
            tried: 0,
            standby: false,
            rounds: 0,
            attempts: 0,
        }
    }

    /// Address of the next try; `None` if none is known.
    pub fn next_address(&mut self) -> Option<String> {
        if let Some(named) = self.named.take() {
            return Some(named);
        }
        let count = self.addresses.len();
        let address = self.addresses.get(self.next.checked_rem(count)?)?.clone();
        self.next = (self.next + 1) % count;
        self.tried += 1;
        Some(address)
    }

    /// A try has succeeded. The same address is tried first when the connection breaks.
    pub fn reached(&mut self, address: &str) {
        if let Some(index) = self.addresses.iter().position(|known| known == address) {
            self.next = index;
        }
        self.named = None;
        self.attempts = 0;
        self.rounds = 0;
        self.begin_round();
    }

    /// The connection is not worth another try now: the next address first.
    pub fn skip(&mut self) {
        self.next = (self.next + 1) % self.addresses.len().max(1);
    }

    /// A try failed or a connection broke; gives the wait before the next try. `unit` is a random number in [0, 1),
    /// half of a round's wait is jitter.
    pub fn failed(&mut self, answer: Answer, unit: f64) -> Duration {
        self.attempts = self.attempts.saturating_add(1);
        if let Answer::Standby { leader } = answer {
            self.standby = true;
            if let Some(leader) = leader.filter(|_| !self.followed) {
                self.followed = true;
                self.named = Some(leader);
                return SOON;
            }
        }
        if self.tried < self.addresses.len() {
            return SOON;
        }
        let longest = match self.standby {
            true => LONGEST_ELECTION,
            false => LONGEST,
        };
        let full = FIRST.saturating_mul(1u32 << self.rounds.min(16)).min(longest);
        self.rounds = self.rounds.saturating_add(1);
        self.begin_round();
        full.mul_f64(0.5 + 0.5 * unit.clamp(0.0, 1.0))
    }

    /// Tries without success so far.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    fn begin_round(&mut self) {
        self.tried = 0;
        self.standby = false;
        self.followed = false;
    }
}

/// How a try failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No answer, or an error.
    None,
    /// The coordinator stands by.
    Standby {
        /// Who leads, if it knows.
        leader: Option<String>,
    },
}

impl Answer {
    /// From the metadata of an error: [`redirect::ROLE`] and [`redirect::LEADER`].
    pub fn of(role: Option<&str>, leader: Option<&str>) -> Self {
        match role {
            Some(redirect::STANDBY) => Self::Standby {
                leader: leader.map(str::to_owned),
            },
            _ => Self::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dial(addresses: &[&str]) -> Dial {
        Dial::new(addresses.iter().map(|address| (*address).to_owned()).collect())
    }

    fn standby(leader: Option<&str>) -> Answer {
        Answer::of(Some("standby"), leader)
    }

    #[test]
    fn waits_double_up_to_the_cap_with_half_as_jitter() {
        let mut one = dial(&["a:1"]);
        let mut wait = |unit| {
            one.next_address();
            one.failed(Answer::None, unit)
        };
        assert_eq!(wait(1.0), FIRST);
        assert_eq!(wait(1.0), FIRST * 2);
        assert_eq!(wait(0.0), FIRST * 2);
        for _ in 0..100 {
            assert!(wait(1.0) <= LONGEST && wait(0.0) >= LONGEST / 2);
        }
        assert_eq!(one.attempts(), 203);
    }

    #[test]
    fn every_address_has_its_try_before_a_wait_and_the_last_good_one_comes_first() {
        let mut dial = dial(&["a:1", "b:1", "c:1"]);
        for (address, wait) in [("a:1", SOON), ("b:1", SOON), ("c:1", FIRST), ("a:1", SOON)] {
            assert_eq!(dial.next_address().as_deref(), Some(address));
            assert_eq!(dial.failed(Answer::None, 1.0), wait);
        }
        dial.reached("b:1");
        assert_eq!(dial.attempts(), 0);
        dial.failed(Answer::None, 1.0);
        assert_eq!(dial.next_address().as_deref(), Some("b:1"));
        dial.reached("b:1");
        dial.skip();
        assert_eq!(dial.next_address().as_deref(), Some("c:1"));
    }

    #[test]
    fn the_leader_that_a_standby_names_is_tried_at_once_but_only_once_a_round() {
        let mut dial = dial(&["a:1", "b:1"]);
        dial.next_address();
        assert_eq!(dial.failed(standby(Some("x:1")), 1.0), SOON);
        assert_eq!(dial.next_address().as_deref(), Some("x:1"));
        // It was the old leader, and is gone.
        assert_eq!(dial.failed(Answer::None, 1.0), SOON);
        assert_eq!(dial.next_address().as_deref(), Some("b:1"));
        assert_eq!(
            dial.failed(standby(Some("x:1")), 1.0),
            FIRST,
            "no more in this round"
        );
        dial.next_address();
        assert_eq!(dial.failed(standby(Some("b:1")), 1.0), SOON);
        assert_eq!(dial.next_address().as_deref(), Some("b:1"));
    }

    #[test]
    fn an_election_is_waited_for_with_short_waits() {
        let mut dial = dial(&["a:1"]);
        for _ in 0..50 {
            dial.next_address();
            assert!(dial.failed(standby(None), 1.0) <= LONGEST_ELECTION);
        }
        assert_eq!(Dial::new(Vec::new()).next_address(), None);
    }
}
