//! Fan-out of one job's events to those who watch it. Every watcher has a bounded buffer of its own: one that reads
//! too slowly loses its oldest events, is told how many, and holds up nobody.

use arcface_proto::v1::{WatchJobResponse, watch_job_response::Event};
use prost_types::Timestamp;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

/// Events that wait for one watcher; at 10 a second that is more than a minute and a half of not reading.
pub const BUFFER: usize = 1024;

struct Buffer {
    events: VecDeque<WatchJobResponse>,
    missed: u64,
    closed: bool,
}

struct Shared {
    buffer: Mutex<Buffer>,
    changed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        // Nothing in here can panic half-way.
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The watchers of one job.
#[derive(Default)]
pub struct Hub {
    watchers: Vec<Arc<Shared>>,
}

impl Hub {
    /// Watchers that still read.
    pub fn len(&mut self) -> usize {
        self.watchers.retain(|watcher| Arc::strong_count(watcher) > 1);
        self.watchers.len()
    }

    /// One watcher more.
    pub fn watch(&mut self) -> Watcher {
        let shared = Arc::new(Shared {
            buffer: Mutex::new(Buffer {
                events: VecDeque::new(),
                missed: 0,
                closed: false,
            }),
            changed: Notify::new(),
        });
        self.watchers.push(shared.clone());
        Watcher { shared }
    }

    /// Gives an event to everybody.
    pub fn publish(&mut self, at: Timestamp, event: &Event) {
        if self.len() == 0 {
            return;
        }
        let response = WatchJobResponse {
            at: Some(at),
            event: Some(event.clone()),
        };
        for watcher in &self.watchers {
            let mut buffer = watcher.lock();
            if buffer.events.len() == BUFFER {
                buffer.events.pop_front();
                buffer.missed += 1;
            }
            buffer.events.push_back(response.clone());
            drop(buffer);
            watcher.changed.notify_one();
        }
    }

    /// No more events: watchers read what is left.
    pub fn close(&mut self) {
        for watcher in self.watchers.drain(..) {
            watcher.lock().closed = true;
            watcher.changed.notify_one();
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.close();
    }
}

/// One reader of a job's events.
pub struct Watcher {
    shared: Arc<Shared>,
}

impl Watcher {
    /// The next event, or `None` after the last. Cancel safe.
    pub async fn next(&mut self) -> Option<WatchJobResponse> {
        loop {
            {
                let mut buffer = self.shared.lock();
                if buffer.missed > 0 {
                    let missed = std::mem::take(&mut buffer.missed);
                    let at = buffer.events.front().and_then(|event| event.at);
                    return Some(WatchJobResponse {
                        at,
                        event: Some(Event::Missed(missed)),
                    });
                }
                if let Some(event) = buffer.events.pop_front() {
                    return Some(event);
                }
                if buffer.closed {
                    return None;
                }
            }
            self.shared.changed.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arcface_proto::v1::StepMetrics;

    fn metrics(step: u64) -> Event {
        Event::Metrics(StepMetrics {
            step,
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn a_slow_watcher_is_told_what_it_missed_and_keeps_the_newest() {
        let mut hub = Hub::default();
        let mut slow = hub.watch();
        for step in 0..BUFFER as u64 + 7 {
            hub.publish(Timestamp::default(), &metrics(step));
        }
        hub.close();
        assert_eq!(slow.next().await.expect("marker").event, Some(Event::Missed(7)));
        for step in 7..BUFFER as u64 + 7 {
            assert_eq!(slow.next().await.expect("event").event, Some(metrics(step)));
        }
        assert_eq!(slow.next().await, None);
    }

    #[tokio::test]
    async fn watchers_that_left_are_forgotten() {
        let mut hub = Hub::default();
        let (stays, leaves) = (hub.watch(), hub.watch());
        assert_eq!(hub.len(), 2);
        drop(leaves);
        assert_eq!(hub.len(), 1);
        drop(stays);
        assert_eq!(hub.len(), 0);
    }
}
