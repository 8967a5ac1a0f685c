#!/usr/bin/env python3
"""Captures of well-formed, malformed and hostile packets, and what must become of each.

usage: make_capture.py make FOLDER [SEED]     writes p0.pcap, p1.pcap and expected.json
       make_capture.py check FOLDER           p0-out.pcap, p1-out.pcap: what the server answered

The packets are for two ports of one server: p0 is untagged, p1 belongs to VLAN 100. What is expected of
a packet is written down here from the protocols' specifications, never from what a server did; the rule
stands beside each. The names are those of `taffrail stats --json`.

expected.json: {"ports": {port: {"packets", "delivered", "handled": {protocol: N}, "dropped": {reason: N}}},
"topics": {topic: {"received", "stored", "duplicate", "refused": {reason: N}, "messages": {partition: [...]}}},
"acks": {request id: [error, ...]}, "welcomes": {...}, "answers": {port: {kind: N}}}
"""

import json
import logging
import random
import struct
import sys
from collections import Counter

logging.getLogger("scapy").setLevel(logging.ERROR)
from scapy.all import (  # noqa: E402
    AH, ARP, Dot1AD, Dot1Q, Ether, GRE, ICMP, ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6MLQuery, ICMPv6ND_NA,
    ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IP, IPOption_NOP, IPOption_Router_Alert, IPv6, IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, HBHOptUnknown, LLC, PadN, PcapWriter, Raw,
    RouterAlert, TCP, UDP, fragment, fragment6, rdpcap,
)

PEER_MAC = "02:00:00:00:00:99"
RAW, LINES, SERVICE, TAGGED, NOBODY = 5000, 514, 9700, 5001, 9999
GROUP4, GROUP4_OWN_LISTENER, OTHER4 = "239.1.2.3", "239.1.2.4", "239.9.9.9"
GROUP6, OTHER6 = "ff15::77", "ff15::99"
# Ids count from 1 in the order of the configuration.
ACKED_TOPIC = 4


class Port:
    """A port's addresses, its capture and what is expected of it."""

    def __init__(self, name, number, vlan):
        self.name, self.vlan = name, vlan
        self.mac = f"02:70:63:61:70:{number:02x}"  # what net_pcap calls its devices
        self.box4, self.peer4, self.net4 = f"10.{77 + number}.0.2", f"10.{77 + number}.0.1", f"10.{77 + number}.0.255"
        self.box6, self.peer6 = f"fd{77 + number}::2", f"fd{77 + number}::1"
        self.frames, self.delivered = [], 0
        self.handled, self.dropped, self.answers = Counter(), Counter(), Counter()

    def eth(self, dst=None, **more):
        frame = Ether(src=PEER_MAC, dst=dst or self.mac, **more)
        return frame / Dot1Q(vlan=self.vlan) if self.vlan else frame

    def v4(self, **more):
        return IP(**{"src": self.peer4, "dst": self.box4, **more})

    def v6(self, **more):
        return IPv6(**{"src": self.peer6, "dst": self.box6, **more})


class Topic:
    """What is expected of a topic."""

    def __init__(self):
        self.received = self.stored = self.duplicate = 0
        self.refused, self.messages = Counter(), {}

    def store(self, partition, *values):
        self.received += len(values)
        self.stored += len(values)
        self.messages.setdefault(str(partition), []).extend(v.decode("latin-1") for v in values)

    def refuse(self, reason, count):
        self.received += count
        self.refused[reason] += count


P0, P1 = Port("p0", 0, None), Port("p1", 1, 100)
TOPICS = {name: Topic() for name in ("ticks", "logs", "groups", "acked", "tagged")}
TICKS, LOGS, GROUPS, ACKED, TAGGED_TOPIC = TOPICS.values()
acks, welcomes = {}, {}
rng = random.Random(1)
serial = 0


def data(most=400):
    """A value that no other message has."""
    global serial
    serial += 1
    return f"message {serial} ".encode() + bytes(rng.randrange(32, 127) for _ in range(rng.randrange(0, most)))


def udp(payload, dport=RAW, **more):
    return UDP(**{"sport": rng.randrange(1024, 65536), "dport": dport, **more}) / Raw(payload)


def capture(port, frame, wirelen=None):
    packet = Raw(frame if isinstance(frame, (bytes, bytearray)) else bytes(frame))
    packet.wirelen = wirelen
    port.frames.append(packet)


def deliver(port, frame):
    capture(port, frame)
    port.delivered += 1


def drop(reason, frame, port=P0, wirelen=None):
    capture(port, frame, wirelen)
    port.dropped[reason] += 1


def handle(protocol, frame, answer=None, port=P0):
    capture(port, frame)
    port.handled[protocol] += 1
    if answer:
        port.answers[answer] += 1


def tick(make):
    """A datagram whose payload is one message of "ticks"; `make(payload)` gives the frame."""
    value = data()
    deliver(P0, make(value))
    TICKS.store(0, value)


def flipped(frame, at, bits=0x40):
    frame = bytearray(bytes(frame))
    frame[at] ^= bits
    return bytes(frame)


def with_checksum(frame, ip=14):
    """The frame with its IPv4 header checksum made good (RFC 791, RFC 1071)."""
    frame = bytearray(frame)
    length = (frame[ip] & 15) * 4
    frame[ip + 10 : ip + 12] = b"\0\0"
    words = struct.unpack(f">{length // 2}H", frame[ip : ip + length])
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    frame[ip + 10 : ip + 12] = struct.pack(">H", total ^ 0xFFFF)
    return bytes(frame)


def good4(value=None, **more):
    return bytes(P0.eth() / P0.v4(**more) / udp(value if value is not None else data()))


def good6(*headers, value=None, **more):
    packet = P0.eth() / P0.v6(**more)
    for header in headers:
        packet = packet / header
    return bytes(packet / udp(value if value is not None else data()))


# ---- stored ----------------------------------------------------------------------------------------

def stored_plain():
    tick(lambda v: P0.eth() / P0.v4() / udp(v))
    tick(lambda v: P0.eth() / P0.v6() / udp(v))


def stored_priority_tag():  # 802.1Q: VLAN id 0 carries a priority alone
    tick(lambda v: P0.eth() / Dot1Q(vlan=0, prio=5) / P0.v4() / udp(v))
    tick(lambda v: P0.eth() / Dot1Q(vlan=0, prio=1) / P0.v6() / udp(v))


def stored_multicast():  # RFC 1112, RFC 2464: groups that the port joined
    tick(lambda v: P0.eth(dst="01:00:5e:01:02:03") / P0.v4(dst=GROUP4) / udp(v))
    tick(lambda v: P0.eth(dst="33:33:00:00:00:77") / P0.v6(dst=GROUP6) / udp(v))
    tick(lambda v: P0.eth(dst="01:00:5e:00:00:01") / P0.v4(dst="224.0.0.1") / udp(v))
    tick(lambda v: P0.eth(dst="33:33:00:00:00:01") / P0.v6(dst="ff02::1") / udp(v))


def stored_group_listener():  # a listener of its own for this group and port
    value = data()
    deliver(P0, P0.eth(dst="01:00:5e:01:02:04") / P0.v4(dst=GROUP4_OWN_LISTENER) / udp(value))
    GROUPS.store(0, value)


def stored_broadcast():  # RFC 922: the network's and the limited broadcast
    tick(lambda v: P0.eth(dst="ff:ff:ff:ff:ff:ff") / P0.v4(dst=P0.net4) / udp(v))
    tick(lambda v: P0.eth(dst="ff:ff:ff:ff:ff:ff") / P0.v4(dst="255.255.255.255") / udp(v))


def stored_no_checksum():  # RFC 768: zero means none, with IPv4
    tick(lambda v: P0.eth() / P0.v4() / udp(v, chksum=0))


def stored_options():  # RFC 791, RFC 2113
    tick(lambda v: P0.eth() / P0.v4(options=[IPOption_NOP()] * 4) / udp(v))
    tick(lambda v: P0.eth() / P0.v4(options=[IPOption_Router_Alert()]) / udp(v))
    tick(lambda v: P0.eth() / P0.v4(options=[IPOption_NOP()] * 40) / udp(v))


def stored_flags():  # neither is a fragment: DF, identification, DSCP, ECN, flow label, TTL 1
    tick(lambda v: P0.eth() / P0.v4(flags="DF", id=7) / udp(v))
    tick(lambda v: P0.eth() / P0.v4(tos=0xBB, ttl=1) / udp(v))
    tick(lambda v: P0.eth() / P0.v6(tc=0xBB, fl=0xFFFFF, hlim=1) / udp(v))


def stored_extension_headers():  # RFC 8200 §4: walked; options that may be skipped are
    pad = PadN(optdata=b"\0\0\0\0")
    skip = HBHOptUnknown(otype=0x1E, optdata=b"abcd")
    tick(lambda v: P0.eth() / P0.v6() / IPv6ExtHdrHopByHop(options=[pad]) / IPv6ExtHdrDestOpt(options=[skip]) / udp(v))
    tick(lambda v: P0.eth() / P0.v6() / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / udp(v))
    tick(lambda v: P0.eth() / P0.v6() / IPv6ExtHdrRouting(type=3, segleft=0, addresses=[]) / udp(v))
    tick(lambda v: P0.eth() / P0.v6() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(type=3, segleft=0, addresses=[])
         / IPv6ExtHdrDestOpt() / udp(v))


def stored_atomic_fragment():  # RFC 6946, RFC 8200 §4.5: offset 0 and no more fragments: a whole packet
    tick(lambda v: P0.eth() / P0.v6() / IPv6ExtHdrFragment(offset=0, m=0, id=9) / udp(v))


def stored_padding():  # bytes behind the IP packet are the link's
    tick(lambda v: bytes(P0.eth() / P0.v4() / udp(v)) + b"\0" * 9)
    tick(lambda v: bytes(P0.eth() / P0.v6() / udp(v)) + b"\xff" * 30)


def stored_surplus():  # RFC 768: the UDP length says where the datagram ends, not the IP length
    value = data()
    frame = bytes(P0.eth() / P0.v4(proto=17) / Raw(bytes(UDP(sport=7, dport=RAW, chksum=0, len=8 + len(value))) + value + b"surplus"))
    deliver(P0, frame)
    TICKS.store(0, value)


def stored_sizes():  # empty, and as large as the MTU allows; RFC 768: the source port may be 0
    for value in (b"", bytes(rng.randrange(256) for _ in range(1472))):
        deliver(P0, P0.eth() / P0.v4() / udp(value))
        TICKS.store(0, value)
    tick(lambda v: P0.eth() / P0.v4() / udp(v, sport=0))


def stored_lines():  # one message for each line that is not empty
    first, second, third = data(40), data(40), data(40)
    deliver(P0, P0.eth() / P0.v4() / udp(first + b"\n" + second + b"\r\n\n\r\n" + third, dport=LINES))
    LOGS.store(0, first, second, third)
    deliver(P0, P0.eth() / P0.v6() / udp(b"\n\r\n\n", dport=LINES))  # delivered, and no message in it
    value = data(40)
    deliver(P0, P0.eth() / P0.v6() / udp(value + b"\n", dport=LINES))
    LOGS.store(0, value)


def stored_vlan():  # the port's VLAN
    for make in (P1.v4, P1.v6):
        value = data()
        deliver(P1, P1.eth() / make() / udp(value, dport=TAGGED))
        TAGGED_TOPIC.store(0, value)


# ---- dropped ---------------------------------------------------------------------------------------

def dropped_cut():  # shorter than a header, or than the length in it
    good, six = good4(), good6()
    drop("truncated", bytes(rng.randrange(1, 14)))
    drop("truncated", good[:-3])
    drop("truncated", good[: rng.randrange(14, 34)])
    drop("truncated", good[: rng.randrange(34, 42)])
    drop("truncated", six[: rng.randrange(14, 54)])
    drop("truncated", six[:-1])
    drop("truncated", good[: len(good) // 2 + 8], wirelen=len(good))  # by the capture's snap length
    drop("truncated", bytes(P0.eth() / P0.v4(proto=17) / Raw(b"\0" * 7)))  # no room for a UDP header
    drop("truncated", bytes(P0.eth() / Dot1Q(vlan=0))[: rng.randrange(14, 18)])
    drop("truncated", flipped(good, 14, 0x45 ^ 0x4F)[:50])  # a header of 60 bytes in 36


def dropped_truncated_extensions():  # RFC 8200 §4: a header that reaches beyond the packet
    drop("truncated", P0.eth() / P0.v6(nh=0) / Raw(bytes([17, 9, 0, 0, 0, 0, 0, 0])))
    drop("truncated", P0.eth() / P0.v6(nh=60) / Raw(b"\x11\0\1"))
    drop("truncated", P0.eth() / P0.v6(nh=44) / Raw(b"\x11\0\0\0"))
    drop("truncated", P0.eth() / P0.v6(nh=0, plen=0) / Raw(bytes([17, 0, 0xC2, 4, 0, 1, 0, 0])))  # jumbogram


def dropped_bad_ip_header():
    good = good4()
    drop("bad_ip_header", flipped(good, 14, 0x10))  # version 5
    drop("bad_ip_header", with_checksum(flipped(good, 14, 0x01)))  # header of 16 bytes
    short = bytearray(good)
    short[16:18] = (19).to_bytes(2, "big")  # total length below the header's
    drop("bad_ip_header", with_checksum(short))
    drop("bad_ip_header", flipped(good6(), 14, 0x20))  # version 4 under IPv6's EtherType
    drop("bad_ip_header", P0.eth(type=0x86DD) / Raw(bytes(P0.v4() / udp(data()))))


def dropped_bad_extensions():  # RFC 8200 §4.2, §4.3, §4.4
    drop("bad_ip_header", good6(IPv6ExtHdrDestOpt(), IPv6ExtHdrHopByHop()))  # hop-by-hop must be first
    drop("bad_ip_header", good6(IPv6ExtHdrRouting(type=3, segleft=1, addresses=["fd77::5"])))  # on its way
    for kind in (0x40, 0x80, 0xC0):  # discard if not understood, without and with an answer
        drop("bad_ip_header", good6(IPv6ExtHdrDestOpt(options=[HBHOptUnknown(otype=kind | 0x1E, optdata=b"abcd")])))
    drop("bad_ip_header", P0.eth() / P0.v6(nh=0) / Raw(bytes([17, 0, 1, 200, 0, 0, 0, 0])) / udp(data()))


def dropped_bad_source():  # RFC 1122 §3.2.1.3, RFC 4291 §2.5.3 and §2.7: no host on a wire is called so
    for source in ("127.0.0.1", "224.0.0.5", "255.255.255.255"):
        drop("bad_source", good4(src=source))
    for source in ("ff02::1", "::1"):
        drop("bad_source", good6(src=source))


def dropped_checksums():
    drop("bad_ipv4_checksum", P0.eth() / P0.v4(chksum=0x1234) / udp(data()))
    drop("bad_ipv4_checksum", flipped(good4(), 22, 0x01))  # a router that forgot to update it
    drop("bad_udp_checksum", flipped(good4(), -1))
    drop("bad_udp_checksum", flipped(good6(), -1))
    drop("bad_udp_checksum", flipped(good4(), 34))  # the source port
    drop("bad_udp_checksum", P0.eth() / P0.v6() / udp(data(), chksum=0))  # RFC 8200 §8.1: required
    drop("bad_udp_checksum", with_checksum(flipped(good4(), 29)))  # the pseudo-header's source address


def dropped_fragments():
    for piece in fragment(P0.v4() / udp(data() + b"x" * 2000), fragsize=1000):
        drop("fragment", P0.eth() / piece)
    for piece in fragment6(P0.v6() / IPv6ExtHdrFragment(id=3) / udp(data() + b"x" * 2000), 1000):
        drop("fragment", P0.eth() / piece)
    drop("fragment", good6(IPv6ExtHdrFragment(offset=0, m=1, id=7)))
    drop("fragment", good6(IPv6ExtHdrHopByHop(), IPv6ExtHdrFragment(offset=185, m=0, id=7)))


def dropped_unknown_port():
    drop("unknown_port", P0.eth() / P0.v4() / udp(data(), dport=NOBODY))
    drop("unknown_port", P0.eth() / P0.v6() / udp(data(), dport=0))
    drop("unknown_port", P0.eth(dst="01:00:5e:01:02:03") / P0.v4(dst=GROUP4) / udp(data(), dport=NOBODY))
    drop("unknown_port", P0.eth() / P0.v4() / udp(data(), dport=TAGGED))  # a listener of the other port
    drop("unknown_port", P1.eth() / P1.v4() / udp(data(), dport=NOBODY), port=P1)


def dropped_not_for_us():
    drop("not_for_us", P0.eth() / P0.v4(dst="10.77.0.77") / udp(data()))
    drop("not_for_us", P0.eth() / P0.v6(dst="fd77::77") / udp(data()))
    drop("not_for_us", P0.eth(dst="01:00:5e:09:09:09") / P0.v4(dst=OTHER4) / udp(data()))
    drop("not_for_us", P0.eth(dst="33:33:00:00:00:99") / P0.v6(dst=OTHER6) / udp(data()))
    drop("not_for_us", P0.eth(dst="02:00:00:00:00:55") / P0.v4() / udp(data()))
    drop("not_for_us", P0.eth(dst="01:00:5e:00:00:fb") / P0.v4(dst="224.0.0.251") / udp(data(), dport=5353))
    drop("not_for_us", P0.eth(dst="33:33:00:00:00:fb") / P0.v6(dst="ff02::fb") / udp(data(), dport=5353))
    drop("not_for_us", P0.eth(dst="01:80:c2:00:00:00") / Raw(b"spanning tree"))
    drop("not_for_us", P0.eth() / P0.v4(dst="127.0.0.1") / udp(data()))
    # RFC 1112: this group has the Ethernet address of one that was joined.
    drop("not_for_us", P0.eth(dst="01:00:5e:01:02:03") / P0.v4(dst="225.129.2.3") / udp(data()))


def dropped_protocols():
    drop("unknown_ethertype", P0.eth(type=0x88B5) / Raw(data()))
    drop("unknown_ethertype", P0.eth(type=0x9100) / Raw(data()))
    drop("unknown_ethertype", bytes(Ether(src=PEER_MAC, dst=P0.mac, type=30) / LLC() / Raw(b"x" * 27)))  # 802.3 length
    drop("unknown_protocol", P0.eth() / P0.v4() / GRE() / Raw(data()))
    drop("unknown_protocol", P0.eth() / P0.v4() / TCP(dport=80) / Raw(data()))
    drop("unknown_protocol", P0.eth() / P0.v6() / TCP(dport=80, flags="S"))
    drop("unknown_protocol", P0.eth() / P0.v4(proto=136) / Raw(bytes(udp(data()))))  # UDP-Lite
    drop("unknown_protocol", P0.eth() / P0.v6(nh=59) / Raw(data()))  # no next header
    drop("unknown_protocol", P0.eth() / P0.v6() / AH(nh=17) / udp(data()))


def dropped_udp_length():
    value = data()
    drop("bad_length", P0.eth() / P0.v4() / udp(value, len=len(value) + 100))
    drop("bad_length", P0.eth() / P0.v4() / udp(value, len=4))
    drop("bad_length", P0.eth() / P0.v6() / udp(value, len=len(value) + 9))
    drop("bad_length", P0.eth() / P0.v6() / udp(value, len=0))  # RFC 2675 jumbo: not here


def dropped_vlans():
    drop("wrong_vlan", P0.eth() / Dot1Q(vlan=42) / P0.v4() / udp(data()))
    drop("wrong_vlan", P0.eth() / Dot1Q(vlan=0) / Dot1Q(vlan=0) / P0.v4() / udp(data()))
    drop("wrong_vlan", P0.eth() / Dot1AD(vlan=7) / Dot1Q(vlan=42) / P0.v4() / udp(data()))
    drop("wrong_vlan", P0.eth() / Dot1AD(vlan=7) / P0.v4() / udp(data()))
    untagged = Ether(src=PEER_MAC, dst=P1.mac)
    drop("wrong_vlan", untagged / P1.v4() / udp(data(), dport=TAGGED), port=P1)
    drop("wrong_vlan", untagged / Dot1Q(vlan=101) / P1.v4() / udp(data(), dport=TAGGED), port=P1)
    drop("wrong_vlan", untagged / Dot1Q(vlan=0) / P1.v4() / udp(data(), dport=TAGGED), port=P1)
    drop("wrong_vlan", untagged / Dot1AD(vlan=100) / P1.v6() / udp(data(), dport=TAGGED), port=P1)
    drop("wrong_vlan", P1.eth() / Dot1Q(vlan=100) / P1.v4() / udp(data(), dport=TAGGED), port=P1)


def dropped_large():  # beyond the MTU: more than one receive buffer
    drop("multi_segment", P0.eth() / P0.v4() / udp(b"x" * 4000))


def dropped_control():
    arp = bytes(P0.eth(dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=PEER_MAC, psrc=P0.peer4, pdst=P0.box4))
    drop("bad_arp", arp[: rng.randrange(14, 42)])
    drop("bad_arp", flipped(arp, 15, 0x02))  # not Ethernet (RFC 826)
    drop("bad_arp", flipped(arp, 19, 0x01))  # addresses of 5 bytes
    drop("bad_arp", flipped(arp, 21, 0x08))  # operation 9
    drop("bad_icmp", flipped(P0.eth() / P0.v4() / ICMP() / Raw(b"ping"), -1))
    drop("bad_icmp", P0.eth() / P0.v4(proto=1) / Raw(b"\x08\0\xf7\xff"))  # shorter than its header (RFC 792)
    drop("bad_icmp", flipped(P0.eth() / P0.v6() / ICMPv6EchoRequest(data=b"ping"), -1))
    drop("bad_icmp", P0.eth() / P0.v6(nh=58) / Raw(b"\x80\0"))
    drop("bad_icmp", flipped(igmp_query(), 14 + 24 + 1))


# ---- handled ---------------------------------------------------------------------------------------

def igmp_query():  # RFC 3376 §4.1, general, version 2 form
    message = struct.pack(">BBH4s", 0x11, 100, (~0x1164) & 0xFFFF, b"\0\0\0\0")
    packet = P0.v4(dst="224.0.0.1", ttl=1, proto=2, options=[IPOption_Router_Alert()])
    return bytes(P0.eth(dst="01:00:5e:00:00:01") / packet / Raw(message))


def handled_arp():  # RFC 826, RFC 5227
    everyone = "ff:ff:ff:ff:ff:ff"
    for port in (P0, P1):
        question = ARP(op=1, hwsrc=PEER_MAC, psrc=port.peer4, pdst=port.box4)
        handle("arp", port.eth(dst=everyone) / question, "arp_reply", port)
    handle("arp", P0.eth(dst=everyone) / ARP(op=1, hwsrc=PEER_MAC, psrc=P0.peer4, pdst="10.77.0.50"))
    handle("arp", P0.eth() / ARP(op=2, hwsrc=PEER_MAC, psrc=P0.peer4, hwdst=P0.mac, pdst=P0.box4))
    handle("arp", P0.eth(dst=everyone) / ARP(op=1, hwsrc=PEER_MAC, psrc="0.0.0.0", pdst=P0.box4), "arp_reply")  # a probe


def handled_echo():  # RFC 792, RFC 4443 §4.2
    for port in (P0, P1):
        handle("icmp", port.eth() / port.v4() / ICMP() / Raw(data()), "echo_reply", port)
        handle("icmpv6", port.eth() / port.v6() / ICMPv6EchoRequest(data=data()), "echo_reply6", port)
    # RFC 1122 §3.2.2.6: an echo to everyone may be left unanswered, and is: it serves amplification.
    handle("icmp", P0.eth(dst="ff:ff:ff:ff:ff:ff") / P0.v4(dst=P0.net4) / ICMP() / Raw(b"smurf"))
    handle("icmp", P0.eth() / P0.v4() / ICMP(type=0) / Raw(b"unasked"))
    handle("icmp", P0.eth() / P0.v4() / ICMP(type=3, code=3) / Raw(good4()[14:50]))
    handle("icmpv6", P0.eth() / P0.v6() / ICMPv6EchoReply(data=b"unasked"))


def handled_discovery():  # RFC 4861
    solicit = P0.v6(dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt=P0.box6) / ICMPv6NDOptSrcLLAddr(lladdr=PEER_MAC)
    handle("icmpv6", P0.eth(dst="33:33:ff:00:00:02") / solicit, "advertisement")
    routed = P0.v6(dst="ff02::1:ff00:2", hlim=64) / ICMPv6ND_NS(tgt=P0.box6)  # §7.1.1: came over a router
    handle("icmpv6", P0.eth(dst="33:33:ff:00:00:02") / routed)
    other = P0.v6(dst="ff02::1:ff00:50", hlim=255) / ICMPv6ND_NS(tgt="fd77::50")  # looked at, not ours
    handle("icmpv6", P0.eth(dst="33:33:ff:00:00:50") / other)
    handle("icmpv6", P0.eth() / P0.v6(hlim=255) / ICMPv6ND_NA(tgt=P0.peer6))
    probe = IPv6(src="::", dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt=P0.box6)  # wants our address
    handle("icmpv6", P0.eth(dst="33:33:ff:00:00:02") / probe, "advertisement")


def handled_groups():  # RFC 3376, RFC 2710; the reports are counted with those that come by themselves
    handle("igmp", igmp_query())
    query = IPv6(src="fe80::99", dst="ff02::1", hlim=1) / IPv6ExtHdrHopByHop(options=[RouterAlert()]) / ICMPv6MLQuery()
    handle("icmpv6", P0.eth(dst="33:33:00:00:00:01") / query)


# ---- the datagram protocol (docs/formats.md) -------------------------------------------------------

def crc32c(octets):
    crc = 0xFFFFFFFF
    for octet in octets:
        crc ^= octet
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(number):
    number = number << 1 ^ number >> 63
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def batch(values, producer, epoch, sequence, attributes=0):
    """Kafka's record batch, magic 2."""
    records = b""
    for delta, value in enumerate(values):
        record = b"\0" + varint(0) + varint(delta) + varint(-1) + varint(len(value)) + value + varint(0)
        records += varint(len(record)) + record
    last = len(values) - 1
    body = struct.pack(">hiqqqhii", attributes, last, 0, 0, producer, epoch, sequence, len(values)) + records
    return struct.pack(">qiibI", 0, len(body) + 9, 0, 2, crc32c(body)) + body


def datagram(kind, body, magic=0x54414644, version=1, flags=0):
    return struct.pack(">IBBH", magic, version, kind, flags) + body


def produce(request, octets, partition=0, level=-1, topic=ACKED_TOPIC):
    return datagram(3, struct.pack(">IIb7xQ", topic, partition, level, request) + octets)


class Producer:
    """An idempotent producer of one partition."""

    def __init__(self, number, partition, epoch=0):
        self.id, self.partition, self.epoch, self.next, self.last = 1 << 62 | number, partition, epoch, 0, None

    def values(self):
        return [data(60) for _ in range(rng.randrange(1, 6))]

    def send(self, octets, errors, level=-1, **more):
        """One PRODUCE; `errors`: the codes of the answers that must come, none for [] ."""
        global serial
        serial += 1
        if errors:
            acks[str(serial)] = errors
        six = rng.random() < 0.5
        frame = P0.eth() / (P0.v6() if six else P0.v4())
        deliver(P0, frame / udp(produce(serial, octets, self.partition, level, **more), dport=SERVICE))

    def good(self, level):
        values = self.values()
        octets = batch(values, self.id, self.epoch, self.next)
        self.last = (octets, len(values))
        self.next += len(values)
        self.send(octets, [0] if level else [], level)
        ACKED.store(self.partition, *values)


PRODUCERS = [Producer(1, 0), Producer(2, 1), Producer(3, 0, epoch=5)]


def service_stored():
    for producer, level in zip(PRODUCERS, rng.sample([0, 1, -1], 3)):
        producer.good(level)


def service_duplicate():  # a retransmission: answered with its first offset, stored once
    for producer in PRODUCERS:
        producer.good(-1)
        octets, count = producer.last
        producer.send(octets, [1])
        ACKED.received += count
        ACKED.duplicate += count


def service_refused():
    for producer in PRODUCERS:
        for make, code, reason, level in (
            (lambda v, p: batch(v, p.id, p.epoch, p.next + 1000), 2, "out_of_order", -1),
            (lambda v, p: batch(v, p.id + 1000, 0, 5), 2, "out_of_order", 1),  # unknown, not its first
            (lambda v, p: flipped(batch(v, p.id, p.epoch, p.next), -1), 4, "invalid_batch", -1),
            (lambda v, p: batch(v, -1, -1, -1), 4, "invalid_batch", -1),  # not idempotent
            (lambda v, p: batch(v, p.id, p.epoch, p.next, attributes=0x20), 4, "invalid_batch", -1),  # control
            (lambda v, p: batch(v, p.id, p.epoch, p.next) + b"\0", 4, "invalid_batch", -1),
            (lambda v, p: batch(v, p.id, p.epoch, p.next, attributes=3), 9, "unsupported_codec", -1),
            (lambda v, p: batch(v, p.id, p.epoch, p.next), 11, "invalid_acks", 7),
        ):
            values = producer.values()
            producer.send(make(values, producer), [code], level)
            ACKED.refuse(reason, len(values))
    fenced = PRODUCERS[2]
    fenced.good(1)
    values = fenced.values()
    fenced.send(batch(values, fenced.id, fenced.epoch - 1, 0), [3])
    ACKED.refuse("fenced", len(values))
    # Less than a batch's header counts as one message.
    fenced.send(b"short", [4])
    ACKED.refuse("invalid_batch", 1)


def service_unknown_partition():
    global serial
    for topic, partition, level in ((99, 0, -1), (ACKED_TOPIC, 2, 1), (0, 0, -1), (2**32 - 1, 2**32 - 1, -1), (99, 0, 0)):
        serial += 1
        if level:
            acks[str(serial)] = [5]
        octets = batch([b"x"], PRODUCERS[0].id, 0, 0)
        drop("unknown_partition", P0.eth() / P0.v4() / udp(produce(serial, octets, partition, level, topic), dport=SERVICE))


def service_hello():
    global serial
    for topic, answer in ((b"acked", [0, ACKED_TOPIC, 2]), (b"nosuch", [5, 0, 0])):
        serial += 1
        welcomes[str(serial)] = answer
        hello = datagram(1, struct.pack(">QH", serial, len(topic)) + topic)
        handle("hello", P0.eth() / P0.v4() / udp(hello, dport=SERVICE))


def service_bad():
    hello = struct.pack(">QH", 1, 5) + b"acked"
    good = batch([b"x"], PRODUCERS[0].id, 0, 0)
    for payload in (
        b"",
        b"TAFD",
        datagram(1, hello, magic=0x54414645),
        datagram(1, hello, version=2),
        datagram(1, hello, flags=1),
        datagram(9, hello),
        datagram(2, b"\0" * 28),  # a WELCOME is for clients
        datagram(4, b"\0" * 4),  # so is an ACK
        datagram(1, hello[:-1]),
        datagram(1, hello + b"x"),
        datagram(1, struct.pack(">QH", 1, 0)),  # a name has 1 to 249 bytes
        datagram(1, struct.pack(">QH", 1, 250) + b"a" * 250),
        datagram(1, struct.pack(">QH", 1, 2) + b"\xff\xfe"),  # not UTF-8
        produce(1, b"")[:31],
    ):
        drop("bad_datagram", P0.eth() / P0.v4() / udp(payload, dport=SERVICE))
    # Nobody could be answered at port 0.
    drop("bad_datagram", P0.eth() / P0.v4() / udp(produce(1, good), dport=SERVICE, sport=0))


def make(folder, seed):
    rng.seed(seed)
    kinds = [f for name, f in globals().items() if name.startswith(("stored_", "dropped_", "handled_", "service_"))]
    assert len(kinds) > 30
    for _ in range(8):
        rng.shuffle(kinds)
        for kind in kinds:
            kind()
    for port in (P0, P1):
        with PcapWriter(f"{folder}/{port.name}.pcap", linktype=1) as out:
            out.write_header(None)
            for frame in port.frames:
                out.write_packet(frame, sec=1, usec=0, caplen=len(frame.load), wirelen=frame.wirelen or len(frame.load))
    ports = {
        p.name: {"packets": len(p.frames), "delivered": p.delivered, "handled": p.handled, "dropped": p.dropped}
        for p in (P0, P1)
    }
    topics = {name: vars(topic) for name, topic in TOPICS.items()}
    expected = {"ports": ports, "topics": topics, "acks": acks, "welcomes": welcomes,
                "answers": {p.name: p.answers for p in (P0, P1)}}
    with open(f"{folder}/expected.json", "w", encoding="ascii") as out:
        json.dump(expected, out)


# ---- answers ---------------------------------------------------------------------------------------

def kind_of(packet):
    """What an answer is; None for what the server says by itself or may leave out."""
    if ARP in packet:
        return "arp_reply" if packet[ARP].op == 2 else None
    if ICMP in packet:
        return {0: "echo_reply"}.get(packet[ICMP].type)
    if ICMPv6EchoReply in packet:
        return "echo_reply6"
    if ICMPv6ND_NA in packet:
        # RFC 4861 §7.2.4: one for a node without an address goes to all, as announcements do.
        return "advertisement" if packet[ICMPv6ND_NA].S else None
    return None


def check(folder):
    with open(f"{folder}/expected.json", encoding="ascii") as file:
        expected = json.load(file)
    found_acks, found_welcomes, frames = {}, {}, {}
    for port in (P0, P1):
        found = Counter()
        packets = rdpcap(f"{folder}/{port.name}-out.pcap")
        frames[port.name] = len(packets)
        for packet in packets:
            octets = bytes(packet)
            assert packet[Ether].src == port.mac, packet.summary()
            assert (packet[Dot1Q].vlan if Dot1Q in packet else None) == port.vlan, packet.summary()
            # Checksums: scapy's own of the same packet must be the ones found.
            again = Ether(octets)
            for layer in (IP, UDP, ICMP):
                if layer in again:
                    # What an ICMP error quotes keeps its sender's.
                    del again[layer].chksum
            if IPv6 in again and hasattr(again[IPv6].payload, "cksum"):
                del again[IPv6].payload.cksum
            assert bytes(again) == octets, f"checksum of {packet.summary()}"
            found[kind_of(packet)] += 1
            if UDP in packet and packet[UDP].sport == SERVICE and ICMP not in packet:
                payload = bytes(packet[UDP].payload)
                assert payload[:5] == b"TAFD\1", payload
                if payload[5] == 2:
                    request, error, _, topic, partitions = struct.unpack(">QHHII", payload[8:28])
                    assert len(payload) == 36
                    found_welcomes[str(request)] = [error, topic, partitions]
                else:
                    assert payload[5] == 4 and len(payload) == 12 + 40 * int.from_bytes(payload[8:10], "big")
                    for at in range(12, len(payload), 40):
                        request, error = struct.unpack(">Q22xH", payload[at : at + 32])
                        found_acks.setdefault(str(request), []).append(error)
        for kind, count in expected["answers"][port.name].items():
            if kind == "advertisement":
                count //= 2  # every other one is for a node without an address
            assert found[kind] == count, f"{port.name}: {count} of {kind} expected, {found[kind]} found"
    assert found_acks == expected["acks"], [
        (k, found_acks.get(k), expected["acks"].get(k))
        for k in {**found_acks, **expected["acks"]}
        if found_acks.get(k) != expected["acks"].get(k)
    ]
    assert found_welcomes == expected["welcomes"], (found_welcomes, expected["welcomes"])
    print(json.dumps(frames))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    else:
        check(sys.argv[2])
