// A peer of js-libp2p, told what to do by JSON lines on standard input: `{"id": 1, "do": "dial", ...}`.
// Every order is answered by a line with its id; whatever happens unasked is a line with `event`.
import { createHash } from 'node:crypto'
import { createInterface } from 'node:readline'

// js-libp2p is written for node 22; 20 lacks this, and imports come after it.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { gossipsub } = await import('@libp2p/gossipsub')
const { circuitRelayServer, circuitRelayTransport } = await import('@libp2p/circuit-relay-v2')
const { peerIdFromString } = await import('@libp2p/peer-id')
const { multiaddr } = await import('@multiformats/multiaddr')

const ECHO = '/interop/echo/1.0.0'
const DOMAIN = Buffer.from('p2pinfer/1/record\0')
const PATIENCE_MS = 15_000

const say = (line) => process.stdout.write(JSON.stringify(line) + '\n')
const until = async (found) => {
  for (const began = Date.now(); Date.now() - began < PATIENCE_MS;) {
    const result = await found()
    if (result) return result
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
  throw new Error('waited in vain')
}

let node

async function echo (stream) {
  for await (const part of stream) {
    if (!stream.send(part.subarray())) {
      await new Promise((resolve) => stream.addEventListener('drain', resolve, { once: true }))
    }
  }
  await stream.close()
}

/** The record of docs/wire.md: author, payload, signature; whether the author signed it. */
async function checkRecord (record) {
  let at = 1
  const take = (head, size) => record.subarray(at + head, at += head + size)
  if (record[0] !== 0x93 || record[at] !== 0xd9) throw new Error('no record')
  const author = take(2, record[at + 1]).toString()
  const payload = record[at] === 0xc4 ? take(2, record[at + 1]) : take(3, record.readUInt16BE(at + 1))
  const signature = take(2, record[at + 1])
  const key = peerIdFromString(author).publicKey
  return { author, valid: await key.verify(Buffer.concat([DOMAIN, payload]), signature) }
}

const orders = {
  async start ({ listen, relay }) {
    const services = {
      identify: identify(),
      ping: ping(),
      pubsub: gossipsub({ allowPublishToZeroTopicPeers: true, emitSelf: false })
    }
    if (relay) services.relay = circuitRelayServer({ reservations: { applyDefaultLimit: false } })
    node = await createLibp2p({
      addresses: { listen },
      transports: [tcp(), circuitRelayTransport()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      services
    })
    await node.handle(ECHO, echo, { runOnLimitedConnection: true })
    node.services.pubsub.addEventListener('message', async ({ detail }) => {
      const record = Buffer.from(detail.data)
      say({
        event: 'message',
        topic: detail.topic,
        signing: detail.type,
        from: detail.from?.toString(),
        record: record.toString('hex'),
        ...await checkRecord(record)
      })
    })
    return { peer_id: node.peerId.toString() }
  },

  /** Our addresses, once there is one that contains `part`. */
  async addrs ({ part }) {
    const found = () => node.getMultiaddrs().map(String).filter((each) => each.includes(part))
    return { addrs: await until(() => found().length > 0 && found()) }
  },

  async dial ({ addr }) {
    const connection = await node.dial(multiaddr(addr))
    return {
      peer_id: connection.remotePeer.toString(),
      encryption: connection.encryption,
      muxer: connection.multiplexer,
      relayed: connection.remoteAddr.toString().includes('/p2p-circuit')
    }
  },

  /** What identify has brought of a peer. */
  async identified ({ peer }) {
    const known = await until(async () => {
      const found = await node.peerStore.get(peerIdFromString(peer))
      // Protocols may be there before identify is: those of streams that the peer opened.
      return found.metadata.has('AgentVersion') && found
    })
    return {
      protocols: known.protocols,
      addrs: known.addresses.map((each) => each.multiaddr.toString()),
      agent: Buffer.from(known.metadata.get('AgentVersion') ?? '').toString()
    }
  },

  async ping ({ peer }) {
    return { ms: await node.services.ping.ping(peerIdFromString(peer)) }
  },

  /** Send so many bytes over a stream of a protocol and read as many back; the digests of both. */
  async exchange ({ peer, protocol, bytes }) {
    const stream = await node.dialProtocol(peerIdFromString(peer), protocol, { runOnLimitedConnection: true })
    const sent = createHash('sha256')
    const received = createHash('sha256')
    const reading = (async () => {
      let count = 0
      for await (const part of stream) {
        received.update(part.subarray())
        count += part.byteLength
        if (count >= bytes) return count
      }
      return count
    })()
    for (let at = 0; at < bytes; at += 1 << 14) {
      const piece = Buffer.alloc(Math.min(1 << 14, bytes - at), at >> 14)
      sent.update(piece)
      if (!stream.send(piece)) {
        await new Promise((resolve) => stream.addEventListener('drain', resolve, { once: true }))
      }
    }
    const count = await reading
    await stream.close()
    return { count, same: sent.digest('hex') === received.digest('hex') }
  },

  async subscribe ({ topic }) {
    node.services.pubsub.subscribe(topic)
    return {}
  },

  async stop () {
    await node.stop()
    setImmediate(() => process.exit(0))
    return {}
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { id, do: order, ...told } = JSON.parse(line)
  orders[order](told).then(
    (result) => say({ id, ...result }),
    (error) => say({ id, error: `${error.name}: ${error.message}` })
  )
}
process.exit(0)
