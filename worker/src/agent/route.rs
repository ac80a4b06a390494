//! Which of this machine's addresses faces the coordinator. Asks the kernel's routing table; sends nothing.

use std::net::UdpSocket;

/// The local address that packets to the first reachable coordinator leave from; loopback if there is none.
/// Connecting a UDP socket sends nothing: it only asks the kernel for the route.
pub fn facing_address(coordinators: &[String]) -> String {
    let route = |coordinator: &String| {
        let socket = UdpSocket::bind("0.0.0.0:0")
            .ok()
            .filter(|socket| socket.connect(coordinator).is_ok())
            .or_else(|| {
                let socket = UdpSocket::bind("[::]:0").ok()?;
                socket.connect(coordinator).ok().map(|()| socket)
            })?;
        Some(socket.local_addr().ok()?.ip().to_string())
    };
    coordinators
        .iter()
        .find_map(route)
        .unwrap_or_else(|| "127.0.0.1".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_coordinator_is_faced_by_loopback() {
        assert_eq!(facing_address(&["127.0.0.1:1".into()]), "127.0.0.1");
        assert_eq!(facing_address(&[]), "127.0.0.1");
    }
}
