package kv

import (
	"crypto/sha1" //nolint:gosec // how Redis names scripts
	"encoding/hex"
)

// script is a Lua script that the server runs in one step, alone.
type script struct{ source, hash string }

// newScript returns a script that carries out a call.
func newScript(source string) script { return newPlainScript(luaAdmit + source) }

func newPlainScript(source string) script {
	sum := sha1.Sum([]byte(source)) //nolint:gosec // see the import
	return script{source: source, hash: hex.EncodeToString(sum[:])}
}

// redisScripts are the scripts of a store. All numbers that they compare are
// decimals of 20 digits, whose order as text is their order as numbers. A script
// begins its answer with what became of it:
const (
	scriptRefused = iota // then the newest mark
	scriptMissing        // the key does not exist, or cas found another version, which follows
	scriptDone           // then the result
)

// luaAdmit is the head of all scripts that carry out a call. KEYS[1] holds the
// marks, ARGV[1] to ARGV[3] are instance, created and generation. It is Mark.Before
// and provider.Fence, in Lua. raise is for after the writes: a full server lets a
// script go on that has written already, so that what frees room is let through.
const luaAdmit = `
local zero = '00000000000000000000'
local instance, created, generation = ARGV[1], ARGV[2], ARGV[3]
local newest = instance ~= '' and redis.call('HGET', KEYS[1], instance) or false
local function before(ac, ag, bc, bg)
  if ac ~= bc and ac ~= zero and bc ~= zero then return ac < bc end
  return ag < bg
end
local newer = instance ~= '' and not newest
if newest then
  local nc, ng = string.sub(newest, 1, 20), string.sub(newest, 21, 40)
  if before(created, generation, nc, ng) then return {0, nc, ng} end
  newer = before(nc, ng, created, generation)
end
local function raise()
  if newer then redis.call('HSET', KEYS[1], instance, created .. generation) end
end
local function alive(meta)
  local expires = string.sub(meta, 21, 40)
  return expires == zero or expires > ARGV[4]
end
`

// luaGet: KEYS marks, meta, data; ARGV[4] now, ARGV[5] the key. A read leaves
// nothing behind, so it does not fail where a mark finds no room.
const luaGet = `
if newer then redis.pcall('HSET', KEYS[1], instance, created .. generation) end
local meta = redis.call('HGET', KEYS[2], ARGV[5])
if not meta or not alive(meta) then return {1} end
return {2, string.sub(meta, 1, 20), redis.call('HGET', KEYS[3], ARGV[5])}
`

// luaWrite: KEYS marks, meta, data, index, expiry, version; ARGV[4] now, ARGV[5]
// the operation, ARGV[6] the key, ARGV[7] the value, ARGV[8] when it expires,
// ARGV[9] the same in milliseconds, rounded up, ARGV[10] the expected version.
// A version is the server's time in microseconds, or one more than the last: so
// none comes twice even when the server lost the latest writes.
const luaWrite = `
local key, expires = ARGV[6], ARGV[8]
local old = redis.call('HGET', KEYS[2], key)
local current = old and alive(old) and string.sub(old, 1, 20) or zero
if ARGV[5] == 'delete' then
  if old then
    redis.call('HDEL', KEYS[2], key)
    redis.call('HDEL', KEYS[3], key)
    redis.call('ZREM', KEYS[4], key)
    redis.call('ZREM', KEYS[5], key)
  end
  raise()
  if current == zero then return {1, zero} end
  return {2, current}
end
if ARGV[5] == 'cas' and current ~= ARGV[10] then
  raise()
  return {1, current}
end
local last, time = tonumber(redis.call('GET', KEYS[6]) or '0'), redis.call('TIME')
local version = math.max(last + 1, tonumber(time[1]) * 1000000 + tonumber(time[2]))
local text = string.format('%020.0f', version)
redis.call('SET', KEYS[6], text)
redis.call('HSET', KEYS[2], key, text .. expires)
redis.call('HSET', KEYS[3], key, ARGV[7])
if not old then redis.call('ZADD', KEYS[4], 0, key) end
if expires ~= zero then
  redis.call('ZADD', KEYS[5], ARGV[9], key)
elseif old and string.sub(old, 21, 40) ~= zero then
  redis.call('ZREM', KEYS[5], key)
end
raise()
return {2, text}
`

// luaList: KEYS marks, meta, data, index; ARGV[4] now, ARGV[5] where to begin,
// ARGV[6] where to end, ARGV[7] the limit, ARGV[8] 1 for keys only, ARGV[9] the
// most bytes, ARGV[10] the most expired keys to pass over. It returns key, version
// and value of each, version 0 for an expired one, and one more than fits on the page.
const luaList = `
if newer then redis.pcall('HSET', KEYS[1], instance, created .. generation) end
local out, from, entries, bytes, expired = {2}, ARGV[5], 0, 0, 0
local limit, most, examined = tonumber(ARGV[7]), tonumber(ARGV[9]), tonumber(ARGV[10])
while true do
  local keys = redis.call('ZRANGEBYLEX', KEYS[4], from, ARGV[6], 'LIMIT', 0, 128)
  for _, key in ipairs(keys) do
    local meta = redis.call('HGET', KEYS[2], key)
    out[#out + 1] = key
    if meta and alive(meta) then
      local value = ARGV[8] == '1' and '' or redis.call('HGET', KEYS[3], key)
      out[#out + 1] = string.sub(meta, 1, 20)
      out[#out + 1] = value
      entries, bytes = entries + 1, bytes + #key + #value
    else
      out[#out + 1] = zero
      out[#out + 1] = ''
      expired = expired + 1
    end
    if entries > limit or bytes > most or expired >= examined then return out end
  end
  if #keys < 128 then return out end
  from = '(' .. keys[128]
end
`

// luaSweep: KEYS meta, data, index, expiry; ARGV[1] now in milliseconds, ARGV[2]
// the most keys.
const luaSweep = `
local keys = redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', ARGV[1], 'LIMIT', 0, tonumber(ARGV[2]))
for _, key in ipairs(keys) do
  redis.call('HDEL', KEYS[1], key)
  redis.call('HDEL', KEYS[2], key)
  redis.call('ZREM', KEYS[3], key)
  redis.call('ZREM', KEYS[4], key)
end
return #keys
`

// luaPrune: KEYS marks; ARGV[1] how many marks are too many, ARGV[2] how many
// stay. Those of the instances that are longest in the cluster go.
const luaPrune = `
if redis.call('HLEN', KEYS[1]) <= tonumber(ARGV[1]) then return 0 end
local all, marks = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #all, 2 do marks[#marks + 1] = {all[i], string.sub(all[i + 1], 1, 20)} end
table.sort(marks, function(a, b) return a[2] < b[2] end)
for i = 1, #marks - tonumber(ARGV[2]) do redis.call('HDEL', KEYS[1], marks[i][1]) end
return #marks - tonumber(ARGV[2])
`
