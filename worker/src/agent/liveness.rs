//! What the agent knows of its coordinator's life: which heartbeats were acknowledged, and when the newest of them
//! was *sent* (an answer proves contact at the time of the question, not later). Pure: time is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Heartbeats whose acknowledgement is still of use; older ones are forgotten.
const REMEMBERED: usize = 256;

/// Heartbeats sent and acknowledged on the current connection, and the last proof of contact over all of them.
#[derive(Debug)]
pub struct Liveness {
    sequence: u64,
    sent: VecDeque<(u64, Instant)>,
    contact: Instant,
}

impl Liveness {
    /// Nothing sent yet; silence counts from `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            sequence: 0,
            sent: VecDeque::new(),
            contact: now,
        }
    }

    /// A new connection was welcomed; its Hello was sent at `hello_sent`. Sequence numbers start again.
    pub fn joined(&mut self, hello_sent: Instant) {
        self.sequence = 0;
        self.sent.clear();
        self.contact = self.contact.max(hello_sent);
    }

    /// Number of the heartbeat that is sent now.
    pub fn next_sequence(&mut self, now: Instant) -> u64 {
        self.sequence += 1;
        self.sent.push_back((self.sequence, now));
        if self.sent.len() > REMEMBERED {
            self.sent.pop_front();
        }
        self.sequence
    }

    /// The coordinator has read everything up to heartbeat `sequence`. False if that was never sent or is old news.
    pub fn acknowledged(&mut self, sequence: u64) -> bool {
        let mut news = false;
        while let Some(&(oldest, sent_at)) = self.sent.front() {
            if oldest > sequence {
                break;
            }
            self.contact = self.contact.max(sent_at);
            self.sent.pop_front();
            news = true;
        }
        news
    }

    /// Time without proven contact.
    pub fn silence(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.contact)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_sending_of_the_last_acknowledged_heartbeat() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut liveness = Liveness::new(start);
        liveness.joined(at(10));
        assert_eq!(liveness.next_sequence(at(100)), 1);
        assert_eq!(liveness.next_sequence(at(200)), 2);
        assert_eq!(liveness.silence(at(300)), Duration::from_millis(290));
        assert!(liveness.acknowledged(1));
        assert!(!liveness.acknowledged(1), "the same acknowledgement again");
        assert_eq!(liveness.silence(at(300)), Duration::from_millis(200));
        assert!(liveness.acknowledged(2));
        assert_eq!(liveness.silence(at(300)), Duration::from_millis(100));
        // A new connection starts to count again and does not move contact back.
        liveness.joined(at(50));
        assert_eq!(liveness.next_sequence(at(300)), 1);
        assert_eq!(liveness.silence(at(300)), Duration::from_millis(100));
    }
}
