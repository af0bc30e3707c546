-- The atomic steps of what is kept of requests; keys are drawn in store_redis.py. ARGV[1] names the step.
--
-- keep      KEYS record, pieces, changes, expiry, sizes; ARGV id, ttl ms, owner, epoch, at, lease ms, done (1 or 0),
--           most bytes of one, most bytes of the space, then the pieces
--           -> {outcome, wanted, bytes of this one, bytes of the space}
-- claim     KEYS the same; ARGV id, ttl ms, owner, lease ms -> {outcome, epoch, wait ms, piece …}
-- transfer  KEYS the same; ARGV id, ttl ms, owner, epoch, successor, lease ms -> 1 or 0
-- drop      KEYS the same; ARGV id, ttl ms, owner, epoch -> 1 or 0

local MOST_CHANGES, MOST_EXPIRED = 64, 100
local step, id, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local record, pieces, changes, expiry, sizes = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local TOTAL = ' total'  -- a field that is no id

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function resize(of, size)
  local before = tonumber(redis.call('HGET', sizes, of) or 0)
  if size > 0 then redis.call('HSET', sizes, of, size) else redis.call('HDEL', sizes, of) end
  redis.call('HINCRBY', sizes, TOTAL, size - before)
end

for _, gone in ipairs(redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, MOST_EXPIRED)) do
  resize(gone, 0)
  redis.call('ZREM', expiry, gone)
  -- Its keys expire by themselves, a moment sooner or later than this; size and content go together.
  redis.call('DEL', expiry .. gone, expiry .. gone .. ':pieces', expiry .. gone .. ':changes')
end

local function touch()
  for _, key in ipairs({record, pieces, changes}) do redis.call('PEXPIRE', key, ttl) end
  redis.call('ZADD', expiry, now + ttl, id)
  for _, key in ipairs({expiry, sizes}) do redis.call('PEXPIRE', key, 2 * ttl) end
end

local function change(owner, epoch, until_)
  redis.call('HSET', record, 'owner', owner, 'epoch', epoch, 'until', until_, 'wanted', '')
  redis.call('RPUSH', changes, epoch .. ' ' .. owner)
  redis.call('LTRIM', changes, -MOST_CHANGES, -1)
end

local found = redis.call('HMGET', record, 'owner', 'epoch', 'until', 'wanted', 'done')
local owner, epoch = found[1], tonumber(found[2] or 0)

if step == 'keep' then
  local mine, under, at, lease = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
  local most, space = tonumber(ARGV[9]), tonumber(ARGV[10])
  if not owner or under > epoch then
    if at > 0 then return {'gap', 0, 0, 0} end
  elseif owner ~= mine or epoch ~= under then
    return {'fenced', 0, 0, 0}
  end
  if at > redis.call('LLEN', pieces) then return {'gap', 0, 0, 0} end
  local size = 0
  for i = 11, #ARGV do size = size + #ARGV[i] end
  local before = tonumber(redis.call('HGET', sizes, id) or 0)
  local dropped = redis.call('LRANGE', pieces, at, -1)
  size = size + before
  for _, piece in ipairs(dropped) do size = size - #piece end
  local total = tonumber(redis.call('HGET', sizes, TOTAL) or 0) - before + size
  if size > most or total > space then return {'large', 0, size, total} end
  if not owner or under > epoch then change(mine, under, 0) end
  if at == 0 then redis.call('DEL', pieces) elseif #dropped > 0 then redis.call('LTRIM', pieces, 0, at - 1) end
  for i = 11, #ARGV do redis.call('RPUSH', pieces, ARGV[i]) end
  redis.call('HSET', record, 'until', now + lease)
  if ARGV[8] == '1' then redis.call('HSET', record, 'done', '1') end
  if lease == 0 then redis.call('HSET', record, 'wanted', '') end
  resize(id, size)
  touch()
  local wanted = (found[4] or '') ~= '' and ARGV[8] ~= '1'
  return {'kept', wanted and 1 or 0, size, total}
end

if step == 'claim' then
  local mine, lease = ARGV[4], tonumber(ARGV[5])
  if not owner then return {'absent', 0, 0} end
  if found[5] == '1' then return {'done', epoch, 0, unpack(redis.call('LRANGE', pieces, 0, -1))} end
  local wait = tonumber(found[3]) - now
  if wait > 0 and owner ~= mine then
    redis.call('HSET', record, 'wanted', mine)
    return {'held', epoch, wait}
  end
  change(mine, epoch + 1, now + lease)
  touch()
  return {'taken', epoch + 1, 0, unpack(redis.call('LRANGE', pieces, 0, -1))}
end

if step == 'transfer' then
  local mine, under, successor, lease = ARGV[4], tonumber(ARGV[5]), ARGV[6], tonumber(ARGV[7])
  if not owner then
    change(mine, under, 0)
    owner, epoch = mine, under
  end
  if owner == successor and epoch == under + 1 then return 1 end
  if owner ~= mine or epoch ~= under then return 0 end
  change(successor, under + 1, now + lease)
  redis.call('HDEL', record, 'done')
  touch()
  return 1
end

if step == 'drop' then
  if owner ~= ARGV[4] or epoch ~= tonumber(ARGV[5]) then return 0 end
  resize(id, 0)
  redis.call('ZREM', expiry, id)
  return redis.call('DEL', record, pieces, changes)
end

return redis.error_reply('ERR no such step: ' .. tostring(step))
