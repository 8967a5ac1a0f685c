//! `taffrail send-udp`: plain UDP datagrams from the kernel's stack, as a sender of logs or telemetry
//! would send them; a load for trials and tests.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::CliResult;

/// The least time that is worth sleeping: shorter sleeps end late anyway.
const TICK: Duration = Duration::from_micros(500);

/// Send numbered messages as plain UDP datagrams
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to
    #[arg(long, value_name = "ADDR:PORT")]
    to: SocketAddr,
    /// Number of messages
    #[arg(long, short = 'n', default_value_t = 1)]
    count: u64,
    /// Bytes of each message; the number comes first, the rest is filled up
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=65_000))]
    size: u16,
    /// Messages a second; 0: as fast as it goes
    #[arg(long, default_value_t = 0)]
    rate: u64,
    /// Text before the number
    #[arg(long, default_value = "message ")]
    prefix: String,
}

/// Prints what was sent as one line of JSON.
pub fn run(args: &Args) -> CliResult {
    let any: SocketAddr = if args.to.is_ipv4() {
        "0.0.0.0:0".parse()?
    } else {
        "[::]:0".parse()?
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(args.to)?;
    let mut message = Vec::with_capacity(usize::from(args.size).max(64));
    let start = Instant::now();
    let (mut bytes, mut refused) = (0u64, 0u64);
    for number in 0..args.count {
        message.clear();
        {
            use std::io::Write;
            write!(message, "{}{number} ", args.prefix)?;
        }
        message.resize(usize::from(args.size).max(message.len()), b'.');
        loop {
            match socket.send(&message) {
                Ok(sent) => {
                    bytes += sent as u64;
                    break;
                }
                // An ICMP answer to an earlier datagram; this one was not sent. Try it again.
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => refused += 1,
                Err(error) => {
                    return Err(format!("message {number} to {}: {error}", args.to).into());
                }
            }
        }
        if args.rate > 0 {
            let due = Duration::from_secs_f64((number + 1) as f64 / args.rate as f64);
            let ahead = due.saturating_sub(start.elapsed());
            if ahead > TICK {
                std::thread::sleep(ahead);
            }
        }
    }
    let summary = serde_json::json!({
        "sent": args.count, "bytes": bytes, "refused": refused, "seconds": start.elapsed().as_secs_f64(),
    });
    println!("{summary}");
    Ok(())
}
