-- The atomic steps of the directory; its keys are drawn in directory_redis.py. ARGV[1] names the step.
--
-- beat      KEYS alive, held, rates, sources; ARGV incarnation, info, ttl ms, memory ms,
--           n, then n times (which key 2..4, field, value or "" to drop it)
--           -> 1, or 0 when this incarnation was not known: Redis has nothing of it, and all must be written again
-- goodbye   KEYS alive, held, rates; ARGV incarnation -> 1, or 0 when a successor has the name already
-- claim     KEYS claim; ARGV owner, ttl ms -> the owner: the caller, or who was before it
-- release   KEYS claim; ARGV owner -> 1, or 0 when it is another's by now

local step = table.remove(ARGV, 1)

local function incarnation_of(alive)
  local found = redis.call('GET', alive)
  return found and string.match(found, '^([^ ]*) ')
end

if step == 'beat' then
  local mine, info, ttl, memory, n = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
  local known = incarnation_of(KEYS[1]) == mine
  if not known then
    -- The former node of this name is gone, and so are its bytes; the revisions that it found are still true.
    redis.call('DEL', KEYS[2], KEYS[3])
  end
  redis.call('SET', KEYS[1], mine .. ' ' .. info, 'PX', ttl)
  for i = 0, n - 1 do
    local key, field, value = KEYS[tonumber(ARGV[6 + 3 * i])], ARGV[7 + 3 * i], ARGV[8 + 3 * i]
    if value == '' then redis.call('HDEL', key, field) else redis.call('HSET', key, field, value) end
  end
  redis.call('PEXPIRE', KEYS[2], ttl)
  redis.call('PEXPIRE', KEYS[3], ttl)
  redis.call('PEXPIRE', KEYS[4], memory)
  return known and 1 or 0
end

if step == 'goodbye' then
  if incarnation_of(KEYS[1]) ~= ARGV[1] then return 0 end
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
  return 1
end

if step == 'claim' then
  local owner = redis.call('GET', KEYS[1])
  if owner and owner ~= ARGV[1] then return owner end
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return ARGV[1]
end

if step == 'release' then
  if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
  return redis.call('DEL', KEYS[1])
end

return redis.error_reply('ERR no such step: ' .. tostring(step))
