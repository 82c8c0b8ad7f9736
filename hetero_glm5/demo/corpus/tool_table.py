"""The tools that documents offer, as a table. A tool's first line holds its function's names; then

    does   descriptions
    +      a required argument: names = kind : descriptions
    ?      an optional one:     names = kind, how the user asks for it : descriptions
    ask    what the user says
    both   the same for two values {a} and {b} of the first argument, which takes two calls
    gets   the result's fields: name=kind
    says   the answer from arguments and result

with alternatives between ` | `; an indented line goes on with the one before. An argument is called by its first name
in this table; tool_values.py draws the kinds.
"""

TABLE = """
get_weather current_weather fetch_weather weather_report check_weather
does Get the current weather | Get the current weather in a given location | Weather of a place | Current weather
  for a city
+ city location place town = city : The city | The city and state, e.g. San Francisco, CA | City name | Name of the
  place
? unit units scale = celsius/fahrenheit, in {} : Temperature unit | The unit | Scale of the temperature
ask What is the weather in {city}? | What's the weather like in {city} today? | How is the weather in {city}? |
  What's the weather in {city}? | What is the weather like in {city} today? | What's the weather like in
  {city}? | Tell me the weather in {city}. | What is the weather like in {city} right now? |
  Weather in {city}, please.
both What is the weather in {a} and in {b}? | What's the weather like in {a} and in {b} today? | What is the weather
  in {a} and {b}? | How is the weather in {a} and in {b}?
gets temperature=int:-9:39 sky=sky
says It is {temperature} degrees and {sky} in {city}.

get_forecast weather_forecast forecast_days predict_weather
does Weather forecast for the next days | Get a forecast | Forecast for a city
+ city place location = city : The city | Where
+ days num_days count = int:2:14 : Number of days | How many days
ask What will the weather be in {city} over the next {days} days? | Give me the {days} day forecast for {city}. |
  Forecast for {city} for {days} days, please.
gets low=int:-9:12 high=int:13:39 sky=sky
says The next {days} days in {city} will be {sky}, from {low} to {high} degrees.

get_time current_time local_time time_in clock
does Get the local time of a city | Current time in a place | What time it is somewhere
+ city place location timezone = city : The city | Place to look up
ask What time is it in {city}? | Tell me the time in {city}. | What is the local time in {city}?
both What time is it in {a} and in {b}? | Tell me the time in {a} and in {b}.
gets time=time
says It is {time} in {city}.

get_date today current_date what_day
does Get today's date | The current date | Returns the date
ask What date is it today? | What is today's date? | Which day is it? | Tell me the date.
gets date=date weekday=day
says Today is {weekday}, {date}.

web_search search search_web find_online internet_search
does Search the web | Look something up on the internet | Find web pages
+ query q text search_term = topic : What to search for | Search query
? limit max_results count = int:2:20, with {} results : Number of results
ask Search the web for {query}. | Look up {query} online. | Find pages about {query}. | Search for {query}.
gets title=title url=url
says I found "{title}" at {url}.

search_news get_news news_headlines latest_news
does Find news | Latest headlines about a topic | Search news articles
+ topic subject query = topic : The topic | Subject of the news
? day date since = day, from {} : Day of the news
ask What is the news about {topic}? | Find news about {topic}. | Show me headlines about {topic}.
gets headline=title
says The top story is "{headline}".

create_event add_event schedule_meeting new_appointment
does Add an event to the calendar | Put a meeting into the calendar | Create a calendar entry
+ title name subject = title : Title of the event
+ day date weekday = day : The day
+ time start start_time = time : Start time
? place location where = city, in {} : Where it is
ask Put "{title}" into my calendar on {day} at {time}. | Schedule "{title}" for {day} at {time}. | Add the event
  "{title}" on {day} at {time}.
gets id=id
says "{title}" is in your calendar on {day} at {time}.

list_events get_events show_calendar agenda
does List the events of a day | Show the calendar | What is planned on a day
+ day date weekday = day : The day
ask What is in my calendar on {day}? | What do I have planned on {day}? | Show my events on {day}.
gets title=title time=time
says On {day} you have "{title}" at {time}.

cancel_event delete_event remove_meeting drop_appointment
does Remove an event from the calendar | Cancel a meeting | Delete a calendar entry
+ title name event = title : Title of the event
ask Cancel "{title}". | Remove "{title}" from my calendar. | Delete the event "{title}".
gets removed=bool
says "{title}" is cancelled.

send_email mail email_person write_mail send_mail
does Send an email | Send a mail to somebody | Write an email
+ to recipient address receiver = email : Address of the recipient | Email address
+ body text message content = sentence : The text | Body of the mail
? subject title topic = title, with the subject "{}" : Subject line
ask Send an email to {to} saying "{body}". | Email {to}: "{body}". | Write to {to} that "{body}".
gets id=id
says I sent the email to {to}.

read_email get_mails unread_mail check_inbox
does Get unread mail | List new emails | Check the inbox
ask Do I have new mail? | Check my inbox. | Read my unread email. | Are there any new emails?
gets sender=email subject=title
says You have mail from {sender}: "{subject}".

send_message text_person send_sms message_contact
does Send a text message | Send an SMS to a contact | Message somebody
+ person name contact to = person : Name of the contact | Who gets it
+ text body message content = sentence : The message
ask Tell {person} "{text}". | Send {person} the message "{text}". | Text {person}: "{text}". | Message {person}
  "{text}".
gets sent=bool
says I told {person}.

call_contact phone_call dial make_call ring
does Call somebody by phone | Make a phone call | Dial a contact
+ person name contact who = person : Who to call
ask Call {person}. | Phone {person}, please. | I want to talk to {person} on the phone.
gets status=calling/busy/connected
says I am calling {person}: {status}.

find_contact get_contact lookup_person address_book
does Find a contact | Look up a person's address | Get someone's details
+ name person contact who = person : Name of the person
ask What is the email address of {name}? | Find {name} in my contacts. | Look up the contact {name}.
both Look up the contacts {a} and {b}. | What are the email addresses of {a} and {b}?
gets email=email phone=phone
says The address of {name} is {email}, and the phone number is {phone}.

add_contact new_contact save_contact store_person
does Save a contact | Add someone to the contacts | Store a new person
+ contact person entry details = contact : Name and phone
ask Save the contact {contact}. | Add {contact} to my contacts. | Store {contact}.
gets id=id
says The contact is saved as {id}.

read_file open_file load_file cat_file get_file
does Read a file | Get the content of a file | Open a file
+ path file filename name = file : Path of the file | File name
ask Read the file {path}. | What is in {path}? | Show me {path}. | Open {path}.
both Read the files {a} and {b}. | Show me {a} and {b}.
gets content=sentence
says The file {path} says: "{content}".

write_file save_file create_file store_file
does Write a file | Save text to a file | Create a file
+ path file filename name = file : Path of the file
+ text content data body = sentence : What to write
? append add keep_old = true, and keep what is there : Append to the file
ask Write "{text}" into {path}. | Save "{text}" to {path}. | Put "{text}" into the file {path}.
gets bytes=int:10:900
says I wrote {bytes} bytes to {path}.

delete_file remove_file erase_file unlink
does Delete a file | Remove a file | Erase a file
+ path file filename name = file : Path of the file
? force sure no_confirm = true, without asking me : Do not ask
ask Delete {path}. | Remove the file {path}. | Erase {path}.
gets deleted=bool
says {path} is deleted.

list_files ls list_folder directory_listing
does List files | List the files of a folder | Show a directory
+ folder directory dir path = folder : The folder
? hidden all show_hidden = true, and also the hidden ones : Show hidden files too
ask List the files in {folder}. | Which files are in {folder}? | Show what is in {folder}.
gets first=file count=int:2:90
says {folder} holds {count} files; the first is {first}.

copy_file duplicate_file cp
does Copy a file | Make a copy of a file
+ source src from_path = file : File to copy
+ target dst to_path = file : Name of the copy
ask Copy {source} to {target}. | Make a copy of {source} called {target}.
gets copied=bool
says I copied {source} to {target}.

move_file rename_file mv
does Rename or move a file | Move a file
+ old source from_path = file : Old name
+ new target to_path = file : New name
ask Rename {old} to {new}. | Move {old} to {new}.
gets moved=bool
says {old} is now {new}.

run_code execute_code python run_python exec_code
does Run code | Execute a Python program | Run Python
+ code source program script = code : The code
ask Run {code}. | Execute the code {code}. | What does {code} print?
gets output=int:2:9999
says The output is {output}.

run_command shell bash execute_shell
does Run a shell command | Execute a command
+ command cmd line = command : The command line
ask Run the command "{command}". | Execute "{command}" in the shell.
gets exit_code=int:0:3 output=sentence
says It ended with {exit_code} and printed: "{output}".

calculate calculator compute evaluate math_eval
does Evaluate an expression | Calculate a result | Do arithmetic
+ expression expr formula input = expression : The expression
ask Use the tool to work out {expression}. | Evaluate {expression} with the calculator. | Let the calculator do
  {expression}.
gets result=int:2:999
says The result is {result}.

convert_units unit_converter convert change_units
does Convert units | Convert a value to another unit
+ value amount number = num:1:900 : The value
+ source from_unit unit = unit : Unit to convert from
+ target to_unit new_unit = unit : Unit to convert to
ask Convert {value} {source} to {target}. | How much is {value} {source} in {target}? | What are {value} {source} in
  {target}?
gets value=num:1:900
says That is {value} {target}.

convert_currency exchange currency_converter change_money
does Convert money | Exchange rate conversion | Convert between currencies
+ amount value sum = int:5:9000 : Amount of money
+ source from_currency base = currency : Currency to convert from
+ target to_currency quote = currency : Currency to convert to
ask How much is {amount} {source} in {target}? | Convert {amount} {source} to {target}. | Change {amount} {source}
  into {target}.
gets result=num:5:9000
says {amount} {source} are {result} {target}.

get_stock_price stock_price share_price quote_stock
does Get a stock price | Current price of a share | Price of a stock
+ symbol ticker stock company = ticker : Ticker symbol | Symbol of the stock
ask What is the stock price of {symbol}? | How much is one share of {symbol}? | Check the stock {symbol}.
both What are the stock prices of {a} and {b}? | Compare the stocks {a} and {b}.
gets price=num:5:900 currency=currency
says {symbol} stands at {price} {currency}.

translate translate_text translator to_language
does Translate text | Translate into another language
+ text phrase sentence input = sentence : Text to translate
+ language target lang to = language : Target language
ask Translate "{text}" into {language}. | How do you say "{text}" in {language}? | Put "{text}" into {language}.
gets translation=title
says In {language} it is "{translation}".

detect_language guess_language identify_language
does Detect the language of a text | Find out a language
+ text phrase sentence input = sentence : The text
ask What language is "{text}"? | Which language is "{text}" written in?
gets language=language
says That is {language}.

play_music play_song start_music play_track
does Play music | Play a song | Start a track
+ song title track name = title : Title of the song
? artist by singer band = person, by {} : Who sings
? volume loudness level = int:1:100, at volume {} : Volume in percent
ask Play "{song}". | Put on the song "{song}". | I want to hear "{song}".
gets length=time
says I am playing "{song}".

stop_music pause_music pause stop_playback
does Stop the music | Pause playback | Stop what is playing
ask Stop the music. | Pause the song. | Please turn the music off.
gets stopped=bool
says The music has stopped.

set_volume change_volume volume adjust_sound
does Set the volume | Change how loud it is
+ level volume percent value = int:0:100 : Volume in percent
ask Set the volume to {level}. | Turn the volume to {level} percent. | Make the volume {level}.
gets level=int:0:100
says The volume is now {level}.

create_playlist new_playlist make_playlist
does Create a playlist | Make a list of songs
+ name title playlist = title : Name of the list
+ songs tracks items = titles : The songs
ask Make a playlist "{name}" with {songs}. | Create the playlist "{name}" from {songs}.
gets id=id
says The playlist "{name}" is ready.

set_timer start_timer timer countdown
does Start a timer | Set a countdown
+ minutes duration length = int:1:180 : Minutes
? label name title = title, called "{}" : Name of the timer
ask Set a timer for {minutes} minutes. | Start a timer of {minutes} minutes. | Wake me in {minutes} minutes.
both Set timers for {a} and {b} minutes. | Start two timers, {a} and {b} minutes.
gets id=id
says The timer runs for {minutes} minutes.

set_alarm alarm wake_up new_alarm
does Set an alarm | Set an alarm clock
+ time at when = time : Time of the alarm
? day weekday on = day, on {} : The day
ask Set an alarm for {time}. | Wake me at {time}. | I need an alarm at {time}.
gets id=id
says The alarm is set for {time}.

set_reminder remind add_reminder remind_me
does Set a reminder | Remind the user
+ text what task message = errand : What to remember
+ time at when = time : When
ask Remind me to {text} at {time}. | At {time}, remind me to {text}.
gets id=id
says I will remind you to {text} at {time}.
"""
